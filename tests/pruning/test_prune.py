import copy
import dataclasses

import pytest
import torch
from torch import nn

from convette.cost import count
from convette.errors import BudgetError, FileFormatError, StructureError, UsageError
from convette.pruning import ALLOCATIONS, CRITERIA, PruneSettings, check_budget, prune
from convette.pruning import _run as run_module
from convette.runtime import Latency
from convette.surgery import card_of, structure_log
from convette.training import TrainSettings

QUICK = TrainSettings(batch_size=64, learning_rate=0.05, augmentation=(), ema_decay=None, precision="fp32")


def bare(**choices) -> PruneSettings:
    return PruneSettings(**{"epochs": 0, "steps": 2, **choices})


@pytest.fixture
def small(digits) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(digits.preprocessing.channels, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, digits.num_classes),
    )


def fake_latency(milliseconds: float) -> Latency:
    return Latency(
        engine="eager:cpu",
        device="cpu",
        precision="fp32",
        batch_size=1,
        threads=1,
        samples=100,
        p50=milliseconds,
        p95=milliseconds * 1.2,
        p99=milliseconds * 1.5,
        mean=milliseconds,
        p50_interval=(milliseconds * 0.99, milliseconds * 1.01),
        cold_start=1.0,
        load_average=0.0,
        timings=(milliseconds,),
    )


def latency_by_macs(networks, example, engine):
    """A machine whose latency is a tenth of a millisecond plus a staircase of the MACs."""
    return {name: fake_latency(0.1 + count(network, example).macs // 2000 / 50) for name, network in networks.items()}


@pytest.mark.parametrize("metric", ["macs", "parameters", "size", "memory"])
def test_budget_is_met_as_counted_and_the_model_is_left_alone(network, example, metric):
    before = copy.deepcopy(network.state_dict())
    result = prune(network, example, f"{metric}<=60%", bare())
    assert result.met and count(result.model, example).get(metric) <= 0.6 * count(network, example).get(metric)
    assert result.end.get(metric) == count(result.model, example).get(metric)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert result.model(example).shape == network(example).shape
    assert result.removed and all(now < then for then, now in result.removed.values())
    assert result.widths["head"] == (10, 10) and "head" not in result.removed
    assert len(structure_log(result.model).edits) > 0 and not structure_log(network).edits


def test_limits_together_and_steps_on_the_way(network, example):
    result = prune(network, example, "macs<=40%, parameters<=50%", bare(steps=4))
    assert result.met and len(result.statuses) == 2
    macs = [record.cost.macs for record in result.steps]
    assert [record.step for record in result.steps] == [0, 1, 2, 3, 4]
    assert macs == sorted(macs, reverse=True)
    for step, value in enumerate(macs):
        assert value <= macs[0] * 0.4 ** (step / 4) + 1
    assert card_of(result.model).history[-1]["step"] == "prune"
    assert card_of(result.model).history[-1]["end"]["macs"] == macs[-1]
    assert result.steps[-1].accuracy is None


def test_no_layer_falls_below_the_share_of_its_first_width(network, example):
    result = prune(network, example, "macs<=45%", bare(steps=3, min_fraction=0.5))
    assert all(now >= then * 0.5 for then, now in result.widths.values())


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_any_criterion_goes_with_any_allocation(small, digits, criterion, allocation):
    settings = bare(criterion=criterion, allocation=allocation, steps=1, calibration_images=64)
    result = prune(small, digits, "macs<=50%", settings, device="cpu")
    assert result.met
    assert result.end.macs > 0.4 * result.start.macs
    assert 0 <= result.steps[-1].accuracy <= 1


def test_channels_stay_in_multiples(network, example):
    result = prune(network, example, "macs<=60%", bare(multiple_of=4))
    assert result.met and all(now % 4 == 0 for _, now in result.removed.values())


@pytest.mark.parametrize(
    "budget",
    ["macs<=1100", "parameters<=0.05K", "size<=300B", "memory<=0.3KB", "latency<=1us", "macs<=99%, latency<=1us"],
)
def test_out_of_reach_is_said_before_anything_is_cut(network, example, budget):
    with pytest.raises(BudgetError, match="at the least") as caught:
        prune(network, example, budget, bare(), measure=latency_by_macs)
    assert caught.value.exit_code == 4
    assert budget.split("<")[0] in str(caught.value) or "latency" in str(caught.value)


def test_the_smallest_cost_is_told_beforehand(network, small, digits, example):
    smallest = check_budget(network, example, "macs<=50%, latency<=90%", PruneSettings(), measure=latency_by_macs)
    assert smallest.macs < 0.1 * count(network, example).macs
    assert smallest.get("latency") < 0.5
    floor = check_budget(network, example, "macs<=90%", PruneSettings(min_fraction=0.5))
    with pytest.raises(BudgetError, match="at the least"):
        check_budget(network, example, f"macs<={(floor.macs - 1) / 1000}K", PruneSettings(min_fraction=0.5))
    result = prune(network, example, f"macs<={floor.macs / 1000}K", bare(min_fraction=0.5, criterion="l2"))
    assert result.end.macs == floor.macs
    assert check_budget(small, digits, "macs<=50%", PruneSettings(criterion="taylor", allocation="per_layer")).macs > 0


@pytest.mark.parametrize("budget", ["latency<=60%", "latency<=1.5ms", "latency.p95<=60%@eager:cpu"])
@pytest.mark.parametrize("steps", [1, 3])
def test_latency_is_met_by_measuring(network, example, budget, steps):
    measured = []

    def measure(networks, example, engine):
        measured.append(sorted(networks))
        return latency_by_macs(networks, example, engine)

    result = prune(network, example, budget, bare(steps=steps), measure=measure)
    assert result.met
    assert all("start" in names for names in measured)
    assert measured[-1] == ["end", "start"]
    start, end = result.start.get("latency"), result.end.get("latency")
    assert start == pytest.approx(latency_by_macs({"": network}, example, "")[""].p50)
    bound = result.statuses[0].limit.value
    # As tight as the staircase and the margins allow.
    assert result.statuses[0].value > 0.8 * bound
    assert end < start


def test_latency_that_is_missed_at_the_end_is_cut_further(network, example):
    calls = []

    def measure(networks, example, engine):
        latencies = latency_by_macs(networks, example, engine)
        calls.append(networks)
        if "end" in networks and sum("end" in names for names in calls) == 1:
            return {**latencies, "end": fake_latency(latencies["start"].p50 * 0.7)}
        return latencies

    result = prune(network, example, "latency<=60%", bare(steps=1), measure=measure)
    assert result.met and len(result.steps) == 3
    assert result.steps[2].cost.macs < result.steps[1].cost.macs


def test_a_tail_is_aimed_at_by_the_upper_end_of_its_interval(network, example):
    def measure(networks, example, engine):
        found = latency_by_macs(networks, example, engine)
        return {
            name: dataclasses.replace(one, tail_intervals={"p99": (one.p99, one.p99 * 1.25)})
            for name, one in found.items()
        }

    limit = 1.1 * latency_by_macs({"": network}, example, "")[""].p99
    assert prune(network, example, f"latency.p99<={limit}ms", bare(), measure=latency_by_macs).end.macs == (
        count(network, example).macs
    )
    result = prune(network, example, f"latency.p99<={limit}ms", bare(), measure=measure)
    assert result.met and result.end.latency["eager:cpu"].upper("p99") <= limit
    assert result.end.get("latency.p99") <= limit / 1.25


def test_latency_that_never_holds_ends_with_what_was_reached(network, example):
    def measure(networks, example, engine):
        latencies = latency_by_macs(networks, example, engine)
        return {name: fake_latency(10.0) if name == "end" else latency for name, latency in latencies.items()}

    result = prune(network, example, "latency<=60%", bare(steps=1), measure=measure)
    assert not result.met and not result.statuses[0].met
    assert result.statuses[0].value == 10.0


def test_a_budget_that_is_met_already_removes_nothing(network, example):
    result = prune(network, example, "macs<=100%, latency<=100ms", bare(), measure=latency_by_macs)
    assert result.met and not result.removed


def test_recovery_brings_back_accuracy_and_is_recorded(small, digits):
    from convette.training import train

    train(small, digits, QUICK, device="cpu")
    settings = PruneSettings(criterion="taylor", steps=2, epochs=3, calibration_images=128)
    result = prune(small, digits, "macs<=40%", settings, train_settings=QUICK, device="cpu")
    assert result.met
    assert [record.epochs for record in result.steps] == [0, 1, 2]
    assert len(result.recovery) == 3
    assert result.steps[-1].accuracy > result.steps[-1].accuracy_before_recovery
    assert result.steps[-1].accuracy > result.steps[0].accuracy - 0.1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_same_bits(small, digits, tmp_path, monkeypatch, stop_after):
    settings = PruneSettings(criterion="taylor", steps=2, epochs=2, calibration_images=64)

    def go(folder):
        return prune(small, digits, "macs<=50%", settings, train_settings=QUICK, checkpoint_dir=folder, device="cpu")

    undisturbed = go(tmp_path / "whole")
    saves = 0
    save = run_module.StateStore.save

    def stopping(self, *arguments):
        nonlocal saves
        save(self, *arguments)
        saves += 1
        if saves == stop_after:
            raise Stopped

    monkeypatch.setattr(run_module.StateStore, "save", stopping)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped")
    monkeypatch.setattr(run_module.StateStore, "save", save)
    resumed = go(tmp_path / "stopped")
    assert all(
        torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in undisturbed.model.state_dict().items()
    )
    strip = [(record.step, record.cost, record.accuracy, record.epochs) for record in undisturbed.steps]
    assert strip == [(record.step, record.cost, record.accuracy, record.epochs) for record in resumed.steps]
    assert len(resumed.recovery) == len(undisturbed.recovery) == 2
    done = go(tmp_path / "stopped")
    assert all(
        torch.equal(tensor, done.model.state_dict()[name]) for name, tensor in resumed.model.state_dict().items()
    )
    history = [entry["step"] for entry in card_of(undisturbed.model).history]
    assert [entry["step"] for entry in card_of(done.model).history] == history


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(network, example, tmp_path):
    prune(network, example, "macs<=60%", bare(), checkpoint_dir=tmp_path)
    with pytest.raises(UsageError, match="another checkpoint folder"):
        prune(network, example, "macs<=50%", bare(), checkpoint_dir=tmp_path)
    with torch.no_grad():
        network.head.bias[0] += 1
    with pytest.raises(UsageError, match="another model"):
        prune(network, example, "macs<=60%", bare(), checkpoint_dir=tmp_path)
    (tmp_path / "prune-state.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FileFormatError, match="delete it"):
        prune(network, example, "macs<=60%", bare(), checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"criterion": "taylor"}, "criterion taylor needs a data set"),
        ({"allocation": "per_layer"}, "allocation per_layer needs a data set"),
        ({"epochs": 1}, r"prune.epochs = 1: recovery needs a data set"),
    ],
)
def test_choices_that_need_data_say_so(network, example, choices, words):
    with pytest.raises(UsageError, match=words):
        prune(network, example, "macs<=60%", bare(**choices))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"criterion": "taylr"}, r"'taylr'.*'taylor'"),
        ({"allocation": "golbal"}, r"'golbal'.*'global'"),
        ({"steps": 0}, "prune.steps = 0"),
        ({"epochs": -1}, "prune.epochs = -1"),
        ({"min_fraction": 1.5}, "prune.min_fraction = 1.5"),
        ({"latency_margin": 0.6}, "prune.latency_margin"),
        ({"criterion_options": {"agregate": "max"}}, "agregate"),
    ],
)
def test_settings_out_of_range_are_named(choices, words):
    with pytest.raises(UsageError, match=words):
        PruneSettings(**choices)


def test_epochs_are_split_over_the_steps():
    assert [PruneSettings(steps=5, epochs=3).epochs_of(step) for step in range(1, 6)] == [0, 0, 0, 0, 3]
    assert [PruneSettings(steps=3, epochs=8).epochs_of(step) for step in range(1, 4)] == [2, 2, 4]


def test_a_weight_that_is_no_number_stops_with_the_model_intact(network, example):
    with torch.no_grad():
        network.inner.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(StructureError, match="inner"):
        prune(network, example, "macs<=60%", bare())
    assert network.inner.weight.shape == (12, 8, 3, 3)


def test_an_example_of_several_inputs(example):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3)
            self.head = nn.Linear(6, 2)

        def forward(self, a, b):
            return self.head((self.left(a) + self.right(b)).relu().mean((2, 3)))

    result = prune(Two(), {"a": example, "b": example * 2}, "macs<=50%", bare())
    assert result.met and result.removed


@pytest.mark.parametrize("budget", ["macs<=100%", "latency<=10s", "macs<=100%, latency<=10s"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_budget_that_is_met_already_costs_no_training(small, digits, budget, steps):
    settings = PruneSettings(steps=steps, epochs=2)
    result = prune(small, digits, budget, settings, train_settings=QUICK, measure=latency_by_macs)
    assert result.recovery == () and len(result.steps) == 1
    assert result.end.macs == result.start.macs and all(status.met for status in result.statuses)
    weights = small.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())
