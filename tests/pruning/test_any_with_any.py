"""Any criterion with any allocation and any schedule; and every allocation meets its budget, by its own count."""

from types import SimpleNamespace

import pytest
import torch
from tests.pruning.test_errors import QUICK_OPTIONS

from convette.cost import Limit, WidthCost, count
from convette.errors import UsageError
from convette.pruning import ALLOCATIONS, CRITERIA, GradualPruning, WidthRules, find_allocation, random
from convette.pruning._calibration import loss_of_cuts
from convette.pruning.allocation import NEED_DATA, build_ladders
from convette.pruning.methods import GrowingRegularization, SoftPruning
from convette.surgery import apply
from convette.training import TrainSettings, find_method, make_method, train

QUICK = TrainSettings(epochs=1, batch_size=32, learning_rate=0.02, augmentation=(), ema_decay=None, precision="fp32")


def limit(metric: str, value: float) -> Limit:
    return Limit(metric=metric, percentile=None, value=float(value), relative=False, engine=None)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_any_criterion_and_any_allocation_choose_within_a_training(network, graph, example, batches, criterion):
    network.train()
    trainer = SimpleNamespace(state=SimpleNamespace(model=network, example=example, device=torch.device("cpu")))
    width_cost = WidthCost(network, example, graph)
    allocations = sorted(ALLOCATIONS) if criterion in ("l1", "taylor", "channel_utility") else ["per_layer"]
    for allocation in allocations:
        method = GradualPruning(
            "macs<=60%",
            criterion=criterion,
            criterion_options=QUICK_OPTIONS.get(criterion),
            allocation=allocation,
            calibration=batches,
            times=1,
        )
        method.cuts = 1
        chosen = {name: torch.tensor(kept) for name, kept in method.choose(trainer, graph).items()}
        assert 0.4 * width_cost.macs({}) < width_cost.macs(chosen) <= 0.6 * width_cost.macs({})
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("method", [GradualPruning, GrowingRegularization, SoftPruning])
@pytest.mark.parametrize("choices", [("fisher", "evolution"), ("linear_redundancy", "exact")])
def test_schedules_in_training_take_them_by_name_as_a_recipe_does(network, few, method, choices):
    criterion, allocation = choices
    options = {"budget": "macs<=50%", "criterion": criterion, "allocation": allocation, "calibration_images": 32}
    assert find_method(method.__name__) is method
    made = make_method(method, {**options, "constraints": "keep stem, minimum=3"}, few)
    start = count(network, few.preprocessing(few.train.images(torch.tensor([0]))))
    trained = train(network, few, QUICK, methods=(made,), device="cpu").model
    end = count(trained, few.preprocessing(few.train.images(torch.tensor([0]))))
    assert end.macs <= 0.5 * start.macs and trained.stem.out_channels == 8 and trained.inner.out_channels >= 3
    with pytest.raises(UsageError, match="needs calibration batches"):
        method("macs<=50%", criterion="fisher")
    with pytest.raises(UsageError, match="allocation evolution needs calibration"):
        method("macs<=50%", allocation="evolution")


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
@pytest.mark.parametrize(
    "shares", [{"macs": 0.5}, {"parameters": 0.4}, {"size": 0.7}, {"macs": 0.6, "parameters": 0.3}], ids=str
)
def test_every_allocation_meets_its_budget_and_leaves_little_of_it(
    network, graph, example, batches, allocation, shares
):
    start, width_cost = count(network, example), WidthCost(network, example, graph)
    limits = [limit(metric, share * start.get(metric)) for metric, share in shares.items()]
    scores = random(network, graph, seed=3)
    rules = WidthRules(minimum={"hidden": 2})
    loss = loss_of_cuts(network, graph, batches) if allocation in NEED_DATA else None
    selection = find_allocation(allocation)(scores, graph, width_cost, limits, rules=rules, loss=loss)
    assert len(selection.get("hidden", range(20))) >= 2
    step = _one_step_up(scores, graph, width_cost, rules, selection, limits)
    apply(network, graph.shrink(selection))
    end = count(network, example)
    left = {one.metric: 1 - end.get(one.metric) / one.value for one in limits}
    assert min(left.values()) >= 0, "counted on the network that was cut, not predicted"
    # What is left of the tightest limit is less than a step of all groups together takes.
    assert min(left.values()) < step


def _one_step_up(scores, graph, width_cost, rules, selection, limits) -> float:
    """Return how much of the tightest limit one more rung for every group costs."""
    larger = {}
    for ladder in build_ladders(scores, graph, rules):
        rung = ladder.rung_of(selection)
        larger[ladder.name] = ladder.kept(min(rung + 1, len(ladder.widths) - 1))
    predict = {"macs": width_cost.macs, "parameters": width_cost.parameters, "size": width_cost.size}
    return max((predict[one.metric](larger) - predict[one.metric](selection)) / one.value for one in limits)
