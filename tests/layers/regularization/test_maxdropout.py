"""MaxDropout: thresholds, invariances, scopes, gradients, and the networks of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.regularization import (
    MaxDropout,
    WideResNet,
    drop_mask,
    insert_after_stages,
    max_dropout,
    replace_dropout,
)


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_worked_example(p):
    assert max_dropout(torch.arange(5.0), p).tolist() == [0, 1, 2, 0, 0]


def test_ends_of_the_rate_and_eval():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(max_dropout(x, 0.0), x)
    ones = max_dropout(x, 1.0)
    assert torch.equal(ones != 0, x == x.min())
    assert torch.equal(MaxDropout(1.0).eval()(x), x)
    assert not torch.equal(MaxDropout(1.0, active_in_eval=True).eval()(x), x)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1), st.sampled_from(["tensor", "sample", "channel"]))
def test_rectified_input(seed, p, scope):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed)).relu()
    x[:, :, 0, 0] = 0
    y = max_dropout(x, p, scope)
    axes = {"tensor": (0, 1, 2, 3), "sample": (1, 2, 3), "channel": (2, 3)}[scope]
    most = x.amax(axes, keepdim=True)
    torch.testing.assert_close(y, x * (x <= (1 - p) * most))
    assert bool((y <= (1 - p) * most + 1e-6).all()) and bool((y <= x).all())
    # The largest goes wherever there is anything to compare; another call drops the same.
    assert bool((drop_mask(x, p, scope).sum(axes) > 0).all()) and torch.equal(max_dropout(x, p, scope), y)
    assert int((max_dropout(x, p / 2, scope) == 0).sum()) <= int((y == 0).sum())
    for other in (4 * x, x + 8):  # powers of two: exact but for sums
        assert float((drop_mask(other, p, scope) != drop_mask(x, p, scope)).float().mean()) < 0.01


@pytest.mark.parametrize("value", [0.0, 3.0, float("inf"), float("nan")])
def test_constant_input_is_left_alone(value):
    x = torch.full((2, 3), value)
    assert torch.equal(MaxDropout(0.5).train()(x).nan_to_num(-7), x.nan_to_num(-7))


def test_gradient_is_zero_where_dropped_and_one_elsewhere():
    x = torch.randn(3, 4, 5, requires_grad=True)
    state = torch.random.get_rng_state()
    MaxDropout(0.5).train()(x).sum().backward()
    assert torch.equal(x.grad, 1 - drop_mask(x, 0.5).float()) and 0 < float(x.grad.mean()) < 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_drop_rate_is_not_p():
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).relu()
    assert 5e-5 < float(drop_mask(x, 0.3).float().mean()) < 2e-3


def test_scopes_do_not_couple_samples():
    x = torch.rand(4, 2, 3, 3)
    x[0] *= 100
    assert torch.equal(max_dropout(x, 0.3)[1:], x[1:])
    for scope in ("sample", "channel"):
        torch.testing.assert_close(max_dropout(x, 0.3, scope)[1:], max_dropout(x[1:], 0.3, scope))
    with pytest.raises(UsageError, match="nothing to compare"):
        max_dropout(torch.rand(4, 2), 0.3, "channel")


def test_uniform_rate_varies():
    torch.manual_seed(1)
    layer, x = MaxDropout(1.0, rate="uniform").train(), torch.rand(1000)
    shares = [float((layer(x) == 0).float().mean()) for _ in range(20)]
    assert min(shares) < 0.3 and max(shares) > 0.7


def test_half_precision_compares_in_float32():
    x = torch.linspace(0, 1, 1001)
    assert int((max_dropout(x.bfloat16(), 0.001) != x.bfloat16()).sum()) >= 1


def test_resnet18_with_it_has_the_published_number_of_parameters(tmp_path):
    from convette.models import create_model, load, save

    model = create_model("torchvision:resnet18", num_classes=10, stem="small", seed=0)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the CIFAR form's
    insert_after_stages(model)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert [type(getattr(model, f"layer{i}")[-1]) for i in (1, 2, 3, 4)] == [MaxDropout] * 4
    small = insert_after_stages(create_model("resnet20", num_classes=10, seed=0), 0.2, "sample")
    save(small.eval(), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").layer2[-1].scope == "sample"


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:efficientnet_b0", "torchvision:mobilenet_v2"])
def test_dropout_is_replaced(name):
    from convette.models import create_model

    model = create_model(name, num_classes=4, seed=0)
    before = sum(type(m) in (nn.Dropout, nn.Dropout2d) for m in model.modules())
    if before == 0:
        insert_after_stages(model)
    else:
        replace_dropout(model, 0.4)
        assert sum(isinstance(m, MaxDropout) and m.p == 0.4 for m in model.modules()) == before
    assert any(isinstance(m, MaxDropout) for m in model.modules())
    assert not any(type(m) is nn.Dropout for m in model.modules())


def test_wide_resnets():
    for depth, width, count in ((28, 10, 36_479_194), (16, 4, 2_748_890)):
        with torch.device("meta"):
            model = WideResNet(depth, width)
        assert sum(p.numel() for p in model.parameters()) == count
        assert sum(isinstance(m, MaxDropout) for m in model.modules()) == (depth - 4) // 2
    small = WideResNet(10, 1, 3, 1, p=0.5)
    small(torch.randn(2, 1, 16, 16)).sum().backward()
    assert isinstance(WideResNet(10, 1, dropout="random").layer1[0].dropout, nn.Dropout)
    with pytest.raises(UsageError, match="6 n"):
        WideResNet(20)
    with pytest.raises((UsageError, TypeCheckError), match="random"):
        WideResNet(10, 1, dropout="x")


def test_folds_and_refusals():
    assert type(MaxDropout().folded()) is nn.Identity
    with pytest.raises(Stays, match="inference"):
        MaxDropout(active_in_eval=True).folded()
    for arguments in ({"p": 1.1}, {"scope": "x"}, {"rate": "x"}):
        with pytest.raises((UsageError, TypeCheckError), match="MaxDropout"):
            MaxDropout(**arguments)
    with pytest.raises(UsageError, match="stages"):
        insert_after_stages(nn.Linear(2, 2))
