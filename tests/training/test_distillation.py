import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.training import Distillation, Event, TrainSettings, distillation_loss, evaluate, feature_loss, train


@given(st.integers(1, 8), st.integers(2, 10), st.floats(0.5, 20), st.integers(0, 99))
def test_distillation_loss_is_zero_for_equals_and_positive_otherwise(count, classes, temperature, seed):
    torch.manual_seed(seed)
    one, other = torch.randn(count, classes), torch.randn(count, classes)
    assert float(distillation_loss(one, one + 7.0, temperature)) == pytest.approx(0, abs=1e-4)
    assert float(distillation_loss(one, other, temperature)) > 0


def test_distillation_loss_by_its_equation():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(
        4 * float((p * (p / q).log()).sum()), rel=1e-5
    )


def test_at_high_temperature_its_gradient_is_that_of_matching_logits():
    student = torch.randn(4, 5, requires_grad=True)
    teacher = torch.randn(4, 5)
    distillation_loss(student, teacher, 1e3).backward()
    centred = (student - student.mean(1, True)) - (teacher - teacher.mean(1, True))
    assert torch.allclose(student.grad, centred.detach() / 5 / 4, atol=1e-3)


def test_feature_loss_ignores_scale_and_meets_another_size():
    features = torch.randn(2, 3, 4, 4)
    assert float(feature_loss(features, features * 5)) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss(features, -features)) == pytest.approx(4, rel=1e-4)
    assert feature_loss(features, torch.randn(2, 3, 8, 8)).ndim == 0
    assert feature_loss(features, torch.randn(2, 6, 8, 8), nn.Conv2d(3, 6, 1)).ndim == 0


def test_a_student_learns_from_a_teacher_alone(data, make_network):
    teacher = train(make_network(), data, TrainSettings(epochs=12, batch_size=16, augmentation=())).model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    torch.manual_seed(3)
    student = nn.Sequential(
        nn.Conv2d(1, 5, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)
    )
    method = Distillation(teacher, weight=1.0, features={"0": "4"})
    result = train(student, data, TrainSettings(epochs=20, batch_size=16, augmentation=()), methods=[method])
    assert evaluate(student, data.test, data.preprocessing).accuracy > 0.85
    assert set(result.history[0].terms) == {"task", "distillation", "feature:0"}
    assert result.history[-1].terms["feature:0"] < result.history[0].terms["feature:0"]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(module._forward_hooks for module in student.modules())


def test_weights_of_the_terms(data, make_network):
    weights = []

    class Look(Distillation):
        def apply(self, event, trainer):
            super().apply(event, trainer)
            if event is Event.AFTER_LOSS:
                weights.append(dict(trainer.state.losses.weights))

    train(make_network(), data, TrainSettings(epochs=1), methods=[Look(make_network(), weight=0.7)])
    assert weights[0] == pytest.approx({"task": 0.3, "distillation": 0.7})


def test_what_does_not_fit_is_refused(data, make_network):
    with pytest.raises(UsageError, match="weight"):
        Distillation(make_network(), weight=1.5)
    with pytest.raises(UsageError, match="temperature"):
        Distillation(make_network(), temperature=0)
    with pytest.raises(UsageError, match="4 classes, the student 3"):
        train(make_network(), data, TrainSettings(epochs=1), methods=[Distillation(make_network(classes=4))])
    with pytest.raises(UsageError, match="no module 'x'"):
        train(
            make_network(), data, TrainSettings(epochs=1), methods=[Distillation(make_network(), features={"x": "0"})]
        )


def test_a_run_goes_on_with_its_own_teacher_only(data, make_network, tmp_path):
    settings = TrainSettings(epochs=1)
    train(make_network(), data, settings, methods=[Distillation(make_network())], checkpoint_dir=tmp_path)
    other = make_network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(UsageError, match="another teacher"):
        train(make_network(), data, settings, methods=[Distillation(other)], checkpoint_dir=tmp_path)


def test_bf16_distils_features(data, make_network):
    method = Distillation(make_network(), features={"2": "2"})
    settings = TrainSettings(epochs=1, precision="bf16", memory_format="contiguous")
    assert train(make_network(), data, settings, methods=[method]).steps == 1
