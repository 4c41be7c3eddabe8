"""Whatever chooses widths keeps to one `WidthConstraints`, however it was asked for."""

import pytest
from tests.pruning.test_frameworks import N2N

from convette import models
from convette.cost import WidthCost, count
from convette.pruning import ALLOCATIONS, GradualPruning, PruneSettings, prune, random
from convette.pruning._calibration import loss_of_cuts
from convette.pruning.allocation import allocate
from convette.surgery import WidthConstraints
from convette.training import TrainSettings

SHORT = {
    "evolution": {"generations": 1, "population": 3},
    "policy_gradient": {"updates": 1, "rollouts": 2},
    "transformable_architecture_search": {"steps": 3},
}
QUICK = TrainSettings(epochs=1, batch_size=32, learning_rate=0.02, augmentation=(), ema_decay=None, precision="fp32")
SPELLINGS = (
    {"multiple_of": 4, "min_fraction": 0.4, "constraints": "keep stem"},
    {"multiple_of": 2, "min_fraction": 0.0, "constraints": "multiple_of=4, minimum=40%, keep stem"},
    {"min_fraction": 0.4, "constraints": "multiple_of=4, min_fraction=30%, keep stem"},
)


def kept_to(model, start) -> bool:
    """Tell whether the layers of a cut network have a multiple of 4 and two fifths of their channels, the stem all."""
    before = dict(start.named_modules())
    pairs = [(m.out_channels, before[n].out_channels) for n, m in model.named_modules() if hasattr(m, "out_channels")]
    assert any(now < then for now, then in pairs)
    return all(now == then or (now % 4 == 0 and now >= 0.4 * then) for now, then in pairs)


def test_the_settings_are_one_object():
    found = [PruneSettings(**spelling).width_constraints for spelling in SPELLINGS]
    assert found[0] == WidthConstraints(4, 1, False, ("stem",), 0.4) and found[2] == found[0]
    assert found[1] == WidthConstraints(4, 0.4, False, ("stem",), 0.0)
    assert PruneSettings(multiple_of=6, constraints="multiple_of=4, minimum=16").width_constraints == WidthConstraints(
        12, 16, min_fraction=0.1
    )
    assert WidthConstraints.parse(str(found[0])) == found[0]


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_every_allocation_keeps_to_what_the_graph_says(network, graph, example, batches, name):
    width_cost = WidthCost(network, example, graph)
    limits = GradualPruning(f"macs<={0.75 * count(network, example).macs:.0f}").budget.limits
    tight = graph.constrain("multiple_of=4, min_fraction=40%, keep stem")
    loss, scores = loss_of_cuts(network, graph, batches), random(network, tight)
    found = allocate(name, scores, tight, width_cost, limits, loss=loss, options=SHORT.get(name, {}))
    tight.check(found)
    assert found and "stem" not in found
    for group, kept in found.items():
        assert len(kept) % 4 == 0 and len(kept) >= 0.4 * graph[group].size


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_prune_keeps_to_it_with_every_allocation_however_it_is_asked_for(network, few, name):
    choices = {"allocation": name, "allocation_options": SHORT.get(name, {}), "steps": 2, "epochs": 0}
    spellings = SPELLINGS if name == "global" else SPELLINGS[:1]
    for spelling in spellings:
        settings = PruneSettings(**choices, **spelling, calibration_images=32)
        assert kept_to(prune(network, few, "macs<=75%", settings, device="cpu").model, network)


@pytest.mark.parametrize("schedule", ["gradual", "growing", "soft"])
def test_schedules_in_training_keep_to_it(network, few, schedule):
    settings = PruneSettings(schedule=schedule, epochs=1, calibration_images=32, **SPELLINGS[1])
    done = prune(network, few, "macs<=75%", settings, train_settings=QUICK, device="cpu")
    assert done.met and kept_to(done.model, network)


@pytest.mark.parametrize(("schedule", "options"), [("n2n", {**N2N, "least": 2}), ("block_then_channel", {"rounds": 1})])
def test_frameworks_keep_to_it(few, schedule, options):
    start = models.create_model("resnet20", in_channels=1, seed=0)
    settings = PruneSettings(
        schedule=schedule,
        schedule_options=options,
        epochs=2,
        multiple_of=8,
        min_fraction=0.4,
        constraints="keep layer3",
    )
    done = prune(start, few, "macs<=90%", settings, train_settings=QUICK, device="cpu").model
    before = dict(start.named_modules())
    pairs = {n: (m.out_channels, before[n].out_channels) for n, m in done.named_modules() if hasattr(m, "out_channels")}
    assert any(now < then for now, then in pairs.values()) or len(pairs) < 19
    assert all(now % 8 == 0 and now >= 0.4 * then for now, then in pairs.values())
    assert all(now == then for name, (now, then) in pairs.items() if name.startswith("layer3"))
