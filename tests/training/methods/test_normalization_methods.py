"""What the normalisers' methods do in a run: groups, schedules, terms, two streams, resuming."""

import pytest
import torch
from torch import nn

from convette.data import load_data
from convette.errors import UsageError
from convette.layers.normalization import (
    ConsistentBatchNorm2d,
    ConsistentUnit,
    SkewReducedBatchNorm2d,
    SparseSwitchNorm2d,
    collapse,
)
from convette.training import Event, Method, MixStyleDomains, SemiMixStyleTraining, TrainSettings, train
from convette.training.methods.consistent_normalization import ConsistentTraining
from convette.training.methods.norm_loss import NormLossTraining
from convette.training.methods.skewness_batch_norm import AnnealSkewness
from convette.training.methods.sparse_switchable_normalization import SparseSwitch


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", test_fraction=0.7)


SETTINGS = TrainSettings(
    epochs=2, batch_size=128, precision="fp32", memory_format="contiguous", augmentation=("shift",)
)


def network(norm, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)
    )


class Watch(Method):
    """Notes groups and terms before each optimiser step."""

    name, order = "watch", 99

    def __init__(self, look):
        self.events, self.look, self.seen = frozenset({Event.BEFORE_OPTIMIZER_STEP}), look, []

    def apply(self, event, trainer):
        self.seen.append(self.look(trainer))


def groups(trainer):
    return [
        (g.get("role"), g["lr"] / trainer.state.learning_rate, g["weight_decay"], len(g["params"]))
        for g in trainer.state.optimizers["main"].param_groups
    ]


def test_sparse_switch(digits):
    model = network(SparseSwitchNorm2d(6))
    watch = Watch(lambda trainer: (groups(trainer), float(trainer.state.model[1].radius)))
    result = train(model, digits, SETTINGS, methods=[SparseSwitch(), watch])
    first, radius = watch.seen[0]
    assert radius == 0 and watch.seen[-1][1] == pytest.approx(1 - 1 / len(watch.seen))
    _, rate, decay, count = next(group for group in first if group[0] == "sparse_switch")
    assert (rate, decay, count) == (pytest.approx(0.1), 0.0, 2)
    assert sum(group[3] for group in first) == len(list(model.parameters()))
    assert result.model[1].choice() is not None
    assert not isinstance(collapse(result.model)[1], SparseSwitchNorm2d)
    with pytest.raises(UsageError, match="no SparseSwitchNorm2d"):
        train(network(nn.BatchNorm2d(6)), digits, SETTINGS, methods=[SparseSwitch()])


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_norm_loss(digits, mode):
    watch = Watch(lambda trainer: (groups(trainer), dict(trainer.state.losses.weights)))
    method = NormLossTraining(0.05, mode)
    result = train(network(nn.BatchNorm2d(6)), digits, SETTINGS, methods=[method, watch])
    group, weights = watch.seen[0]
    assert ("norm_loss" in weights) == (mode == "loss")
    assert all(decay == 0 for role, _, decay, _ in group) and ("norm_loss", 1.0, 0.0, 2) in group
    free = train(network(nn.BatchNorm2d(6)), digits, SETTINGS, methods=[])

    def distance(model):
        return float((model[0].weight.flatten(1).norm(dim=1) - 1).abs().mean().detach())

    assert distance(result.model) < distance(free.model)


def test_skewness_ends_in_batch_norm(digits):
    model = network(SkewReducedBatchNorm2d(6, 0.7))
    watch = Watch(lambda trainer: float(trainer.state.model[1].linearity))
    result = train(model, digits, SETTINGS, methods=[AnnealSkewness(0.2, 0.8), watch])
    assert watch.seen[0] == 0 and watch.seen == sorted(watch.seen) and watch.seen[-1] > 0.9
    assert isinstance(result.model[1].folded(), nn.BatchNorm2d)
    with pytest.raises(UsageError, match="start"):
        AnnealSkewness(0.9, 0.5)


def unit(stats):
    convs = [nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)]
    return ConsistentUnit(convs, ConsistentBatchNorm2d(6, stats=stats))


def test_clean_images_go_in_front(digits):
    watch = Watch(lambda trainer: (len(trainer.state.images), len(trainer.state.outputs), groups(trainer)))
    result = train(network(unit("clean")), digits, SETTINGS, methods=[ConsistentTraining(digits.preprocessing), watch])
    images, outputs, found = watch.seen[0]
    assert images == 2 * outputs and ("consistent_normalization", pytest.approx(0.1), 0.0, 5) in found
    assert result.history[-1].train_loss < result.history[0].train_loss
    with pytest.raises(UsageError, match="preprocessing"):
        train(network(unit("clean")), digits, SETTINGS, methods=[ConsistentTraining()])
    plain = Watch(lambda trainer: len(trainer.state.images) == len(trainer.state.outputs))
    train(network(unit("joint")), digits, SETTINGS, methods=[ConsistentTraining(), plain])
    assert all(plain.seen)


def test_a_resumed_run_is_the_same(digits, tmp_path):
    """The group of the ratios, its rate and the radius come back from the checkpoint."""
    from convette.errors import InterruptedRun

    class Stop(Method):
        name, events = "stop", frozenset({Event.BATCH_END})

        def apply(self, event, trainer):
            if trainer.state.clock.step == 3:
                trainer._stop = "a test"

    whole = train(network(SparseSwitchNorm2d(6)), digits, SETTINGS, methods=[SparseSwitch()]).model
    with pytest.raises(InterruptedRun):
        train(
            network(SparseSwitchNorm2d(6)), digits, SETTINGS, methods=[SparseSwitch(), Stop()], checkpoint_dir=tmp_path
        )
    again = train(
        network(SparseSwitchNorm2d(6)), digits, SETTINGS, methods=[SparseSwitch()], checkpoint_dir=tmp_path
    ).model
    for (name, one), (_, other) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def styled():
    from convette.layers.normalization import MixStyle

    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), MixStyle(p=1.0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 10),
    )


def test_batches_of_two_domains_in_an_order_of_seed_and_epoch(digits):
    data = digits
    domains = torch.arange(len(data.train)) % 3
    seen = []

    class Watch(Method):
        name, events = "watch", frozenset({Event.AFTER_TRANSFORM})

        def apply(self, event, trainer):
            seen.append(trainer.state.batch.indices)

    settings = TrainSettings(epochs=1, batch_size=32, augmentation=(), ema_decay=None)
    train(styled(), data, settings, methods=[MixStyleDomains(data.train, domains), Watch()], device="cpu")
    first = [batch.clone() for batch in seen]
    for batch in first:
        halves = domains[batch[:16]].unique(), domains[batch[16:]].unique()
        assert len(halves[0]) == len(halves[1]) == 1 and halves[0] != halves[1]
    seen.clear()
    train(styled(), data, settings, methods=[MixStyleDomains(data.train, domains), Watch()], device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    with pytest.raises(UsageError, match="domains for"):
        MixStyleDomains(data.train, domains[:5])


def test_semi_mixstyle_adds_its_term_and_keeps_styles_off_the_labelled_pass(digits):
    data = digits
    method = SemiMixStyleTraining(data.validation, data.preprocessing, threshold=0.0, weight=0.5)
    active = []

    class Watch(Method):
        name, events, order = "watch", frozenset({Event.BEFORE_FORWARD, Event.AFTER_LOSS}), 1

        def apply(self, event, trainer):
            active.append((event, trainer.state.model[1].active))

    settings = TrainSettings(epochs=1, batch_size=64, augmentation=(), ema_decay=None)
    result = train(styled(), data, settings, methods=[method, Watch()], device="cpu")
    assert result.history[0].terms["semi_mixstyle"] > 0
    assert dict(active) == {Event.BEFORE_FORWARD: False, Event.AFTER_LOSS: True}
    with pytest.raises(UsageError, match="no MixStyle"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, settings, methods=[method], device="cpu")
    with pytest.raises(UsageError, match="threshold"):
        SemiMixStyleTraining(data.validation, data.preprocessing, threshold=2.0)
