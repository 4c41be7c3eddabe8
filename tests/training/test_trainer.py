import csv
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from convette.errors import DataError, StructureError, TrainingError, UsageError
from convette.training import Event, Method, PlainStep, TrainSettings, build_optimizer, train
from convette.training.optimizers import schedule_for

PLAIN = {"augmentation": (), "precision": "fp32", "memory_format": "contiguous", "ema_decay": None}


class Watcher(Method):
    """Calls `action(event, trainer)` at the events it is given."""

    def __init__(self, action, *events, name="watcher", order=0):
        self.name, self.order, self.events, self.action = name, order, frozenset(events), action

    def apply(self, event, trainer):
        self.action(event, trainer)


def test_without_methods_it_is_the_plain_loop_bit_for_bit(data, make_network, equal):
    settings = TrainSettings(epochs=3, batch_size=20, **PLAIN)
    ours = train(make_network(), data, settings).model
    network = make_network().train()
    schedule = schedule_for(settings, 4)
    optimizer = build_optimizer([network], settings, 1.0)
    step = 0
    for epoch in range(3):
        batches = data.train.batches(20, shuffle=True, seed=0, epoch=epoch, drop_last=True)
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = settings.peak_learning_rate(20) * schedule(step)
            loss = functional.cross_entropy(
                network(data.preprocessing(batch.images)), batch.labels, label_smoothing=0.1
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert equal(ours, network)


def test_it_learns_and_the_result_tells_how(data, make_network):
    result = train(make_network(), data, TrainSettings(epochs=12, batch_size=16, augmentation=()))
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.9
    assert [record.epoch for record in result.history] == list(range(1, 13))
    assert result.steps == 12 * 6 and result.history[-1].step == result.steps and result.resumed_from is None
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.choice.precision == "fp32" and "not measured" in result.choice.reason
    assert not result.model.training
    json.dumps(result.to_json(), allow_nan=False)


def test_the_caller_keeps_its_random_numbers_and_the_seed_decides(data, make_network, equal):
    settings = TrainSettings(epochs=1, batch_size=16)
    network = make_network(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = train(network, data, settings).model
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert equal(one, train(make_network(dropout=0.5), data, settings).model)
    other = TrainSettings(epochs=1, batch_size=16, seed=1)
    assert not equal(one, train(make_network(dropout=0.5), data, other).model)


def test_accumulation_equals_the_larger_batch(data, make_network):
    base = {"epochs": 2, "label_smoothing": 0.0, **PLAIN}
    whole = train(make_network(norm=False), data, TrainSettings(batch_size=32, **base)).model
    parts = train(make_network(norm=False), data, TrainSettings(batch_size=8, accumulate=4, **base)).model
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_bf16_trains_and_returns_fp32_weights(memory_format, data, make_network):
    settings = TrainSettings(epochs=8, batch_size=16, precision="bf16", memory_format=memory_format, augmentation=())
    result = train(make_network(), data, settings)
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.8
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in result.model.parameters())
    assert result.choice.reason == "given"


def test_the_average_is_what_comes_back(data, make_network, equal):
    averages = []
    watcher = Watcher(lambda event, trainer: averages.append(trainer.state.ema.module), Event.FIT_END)
    model = make_network()
    result = train(model, data, TrainSettings(epochs=1, ema_decay=0.9, augmentation=()), methods=[watcher])
    assert result.model is model and equal(model, averages[0])


def test_gradients_are_clipped_to_their_norm(data, make_network):
    norms = []

    def look(event, trainer):
        gradients = [p.grad.flatten() for p in trainer.state.model.parameters()]
        norms.append(float(torch.cat(gradients).norm()))

    settings = TrainSettings(epochs=1, batch_size=16, gradient_clip=0.01, **PLAIN)
    train(make_network(), data, settings, methods=[Watcher(look, Event.GRADIENTS_READY, Event.BEFORE_OPTIMIZER_STEP)])
    assert all(before > 0.0101 for before in norms[::2]) and all(after <= 0.0101 for after in norms[1::2])


def test_events_come_in_their_order(data, make_network):
    seen = []
    watcher = Watcher(lambda event, trainer: seen.append(event), *(e for e in Event))
    train(make_network(), data, TrainSettings(epochs=1, batch_size=96, augmentation=()), methods=[watcher])
    order = list(Event)
    once = [event for event in order if event in seen]
    assert seen == once and not {Event.STRUCTURE_CHANGED, Event.CHECKPOINT, Event.BEFORE_LOAD, Event.AFTER_LOAD} & set(
        seen
    )


def test_the_order_of_registration_changes_nothing(data, make_network, equal):
    def scale(factor, shift):
        def action(event, trainer):
            trainer.state.images = trainer.state.images * factor + shift

        return action

    methods = [
        Watcher(scale(2.0, 0.0), Event.BEFORE_FORWARD, name="double", order=1),
        Watcher(scale(1.0, 1.0), Event.BEFORE_FORWARD, name="shift", order=2),
    ]
    settings = TrainSettings(epochs=1, batch_size=16, **PLAIN)
    one = train(make_network(), data, settings, methods=methods).model
    assert equal(one, train(make_network(), data, settings, methods=methods[::-1]).model)


def test_loss_terms_are_summed_by_weight_and_logged_by_name(data, make_network):
    def add(event, trainer):
        trainer.state.losses.add("size", sum(p.square().sum() for p in trainer.state.model.parameters()), 0.5)

    watcher = Watcher(add, Event.AFTER_LOSS)
    record = train(make_network(), data, TrainSettings(epochs=1, **PLAIN), methods=[watcher]).history[0]
    assert record.train_loss == pytest.approx(record.terms["task"] + 0.5 * record.terms["size"], rel=1e-5)


def test_a_method_may_replace_the_step(data, make_network, equal):
    class Twice(PlainStep):
        """Sharpness-aware in spirit: two passes over the same batch, one step."""

        def run(self, trainer, batches):
            batch = next(batches)
            for _ in range(2):
                super().run(trainer, iter([batch]))

    counts = []

    def swap(event, trainer):
        if event is Event.SETUP:
            trainer.strategy = Twice()
        counts.append(event)

    watcher = Watcher(swap, Event.SETUP, Event.AFTER_OPTIMIZER_STEP)
    result = train(make_network(), data, TrainSettings(epochs=1, batch_size=32, **PLAIN), methods=[watcher])
    assert counts.count(Event.AFTER_OPTIMIZER_STEP) == 6 and result.steps == 3


def test_an_auxiliary_module_is_trained_along(data, make_network):
    kept = {}

    def act(event, trainer):
        if event is Event.SETUP:
            kept["scale"] = trainer.add_auxiliary("scale", nn.Linear(1, 1))
            kept["before"] = kept["scale"].weight.detach().clone()
        else:
            trainer.state.losses.add("scale", (kept["scale"](torch.ones(1, 1)) - 3).square().mean())

    train(make_network(), data, TrainSettings(epochs=2, **PLAIN), methods=[Watcher(act, Event.SETUP, Event.AFTER_LOSS)])
    assert not torch.equal(kept["before"], kept["scale"].weight)


def test_a_loss_that_is_not_finite_is_named_with_the_tensor(data, make_network, tmp_path):
    def poison(event, trainer):
        if trainer.state.clock.step == 7:
            with torch.no_grad():
                trainer.state.model[4].weight[0, 0, 0, 0] = math.nan

    settings = TrainSettings(epochs=3, batch_size=16, **PLAIN)
    watcher = Watcher(poison, Event.BATCH_START)
    with pytest.raises(TrainingError) as caught:
        train(make_network(), data, settings, methods=[watcher], checkpoint_dir=tmp_path)
    text = str(caught.value)
    assert "epoch 2, step 2" in text and "loss term 'task' is nan" in text and "parameter '4.weight'" in text
    assert "checkpoint-000000006" in text and "learning_rate" in text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000006.safetensors"]
    # What is kept is good: without the poison the run goes on to its end.
    assert (
        train(make_network(), data, settings, methods=[Watcher(print, name="watcher")], checkpoint_dir=tmp_path).steps
        == 18
    )


def test_a_method_s_term_that_is_not_finite_is_named(data, make_network):
    def add(event, trainer):
        trainer.state.losses.add("penalty", torch.tensor(1.0) / 0)

    with pytest.raises(TrainingError, match="'penalty' is inf; first not finite: none inside the network"):
        train(make_network(), data, TrainSettings(epochs=1), methods=[Watcher(add, Event.AFTER_LOSS)])


def test_parameters_swapped_behind_the_trainer_are_refused(data, make_network):
    def swap(event, trainer):
        trainer.state.model[4].weight = nn.Parameter(trainer.state.model[4].weight.detach().clone())

    def resize(event, trainer):
        trainer.state.model[8].weight.data = torch.zeros(3, 12)

    def replace(event, trainer):
        trainer.state.model[8] = nn.Linear(24, 3)

    for act in (swap, resize, replace):
        with pytest.raises(StructureError, match=r"trainer\.edit_structure"):
            train(make_network(), data, TrainSettings(epochs=1), methods=[Watcher(act, Event.BATCH_START)])


def test_few_images_make_one_step_and_too_few_are_refused(make_data, make_network):
    small = make_data(train=12)
    assert train(make_network(), small, TrainSettings(epochs=1)).steps == 1
    assert train(make_network(), small, TrainSettings(epochs=1, accumulate=2)).steps == 1
    with pytest.raises(DataError, match="12 training images"):
        train(make_network(), small, TrainSettings(epochs=1, accumulate=20))


def test_logs_hold_every_epoch_as_csv_and_jsonl(data, make_network, tmp_path):
    result = train(make_network(), data, TrainSettings(epochs=3, batch_size=32), log_dir=tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[2]["validation_accuracy"]) == result.history[2].validation_accuracy
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "choice" and lines[0]["precision"] == "fp32"
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2, 3]


def test_tensorboard_is_written_when_asked(data, make_network, tmp_path):
    pytest.importorskip("tensorboard")
    train(make_network(), data, TrainSettings(epochs=1, tensorboard=True), log_dir=tmp_path)
    assert any((tmp_path / "tensorboard").iterdir())


def test_unknown_augmentation_is_refused(data, make_network):
    with pytest.raises(UsageError):
        train(make_network(), data, TrainSettings(epochs=1, augmentation=("flipp",)))
