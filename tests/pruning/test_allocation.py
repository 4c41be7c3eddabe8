import copy
from math import ceil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import Limit, WidthCost, count
from convette.errors import BudgetError, StructureError, UsageError
from convette.pruning import ALLOCATIONS, WidthRules, find_allocation, global_ranking, l1, per_layer, random, uniform
from convette.pruning.allocation._ladder import _ladder
from convette.surgery import Constraints, Group, Member, WidthConstraints, apply, trace
from convette.surgery._constraints import _with

NAMES = sorted(ALLOCATIONS)
SEARCHED = ("evolution", "policy_gradient")  # seconds a call: each metric goes through the same predictions
UNSHAKEN = [HealthCheck.function_scoped_fixture]


def limit(metric: str, value: float) -> Limit:
    return Limit(metric=metric, percentile=None, value=float(value), relative=False, engine=None)


def removed_share(graph):
    """A loss that rises with the share of units that go, ten times as fast in the inner group."""
    sizes = {group.name: group.size for group in graph.groups}

    def loss(selection):
        return 1.0 + sum((10 if n == "inner" else 1) * (1 - len(kept) / sizes[n]) for n, kept in selection.items())

    return loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metric", ["macs", "parameters", "size"])
@settings(max_examples=8, deadline=None, suppress_health_check=UNSHAKEN)
@given(share=st.floats(0.15, 0.99), seed=st.integers(0, 99))
def test_limits_are_met_tightly_and_exactly(network, graph, example, name, metric, share, seed):
    if name in SEARCHED and (metric != "macs" or seed % 3):
        return
    width_cost = WidthCost(network, example, graph)
    start = count(network, example).get(metric)
    scores = random(network, graph, seed=seed)
    bound = share * start
    selection = find_allocation(name)(scores, graph, width_cost, limit(metric, bound), loss=removed_share(graph))
    graph.check(selection)
    shrunk = copy.deepcopy(network)
    apply(shrunk, graph.shrink(selection))
    reached = count(shrunk, example).get(metric)
    assert reached == getattr(width_cost, metric)(selection)
    assert reached <= bound
    too_much = []
    for group in graph.groups:
        kept = selection.get(group.name, torch.arange(group.size))
        gone = sorted(set(range(group.size)) - set(kept.tolist()), key=lambda unit: float(scores[group.name][unit]))
        if gone:
            assert scores[group.name][kept].min() >= scores[group.name][gone[-1]]
            more = {**selection, group.name: torch.tensor(sorted([*kept.tolist(), gone[-1]]))}
            too_much.append(getattr(width_cost, metric)(more) > bound)
    # No unit fits any more; where shares have to stay equal, not one everywhere.
    assert any(too_much) if name == "uniform" else all(too_much)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_goes_where_the_limit_is_met(network, graph, example, name):
    width_cost = WidthCost(network, example, graph)
    whole = limit("macs", width_cost.macs({}))
    assert find_allocation(name)(l1(network, graph), graph, width_cost, whole, loss=removed_share(graph)) == {}


def test_several_limits_hold_together(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    limits = [limit("macs", 0.7 * width_cost.macs({})), limit("parameters", 0.4 * width_cost.parameters({}))]
    selection = global_ranking(l1(network, graph), graph, width_cost, limits)
    assert all(getattr(width_cost, one.metric)(selection) <= one.value for one in limits)


@pytest.mark.parametrize("name", NAMES)
def test_rules_hold(network, graph, example, name):
    width_cost = WidthCost(network, example, graph)
    rules = WidthRules(multiple_of=4, minimum={group.name: ceil(0.4 * group.size) for group in graph.groups})
    half = limit("macs", 0.5 * width_cost.macs({}))
    loss = removed_share(graph)
    selection = find_allocation(name)(l1(network, graph), graph, width_cost, half, rules=rules, loss=loss)
    sizes = {group.name: group.size for group in graph.groups}
    assert selection
    for group, kept in selection.items():
        assert len(kept) % 4 == 0
        assert len(kept) >= 0.4 * sizes[group]


@pytest.mark.parametrize("name", NAMES)
def test_grouped_convolutions_stay_whole(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 20, 7)
    ).eval()
    example = torch.randn(1, 3, 9, 8)
    graph = trace(model, example)
    width_cost = WidthCost(model, example, graph)
    selection = find_allocation(name)(
        random(model, graph, seed=1),
        graph,
        width_cost,
        limit("macs", 0.5 * width_cost.macs({})),
        loss=removed_share(graph),
    )
    graph.check(selection)
    before = model(example).shape
    apply(model, graph.shrink(selection))
    assert model(example).shape == before
    assert count(model, example).macs == width_cost.macs(selection)


def ladder(parts: int, least: int = 1, wanted: WidthConstraints | None = None, **constraints):
    member = Member("conv.weight", 0, torch.arange(12).view(12, 1), "producer", "conv")
    group = _with(
        Group("conv", 12, (member,), Constraints(parts=parts, **constraints)), wanted or WidthConstraints(), 12
    )
    scores = torch.tensor([5.0, 1, 2, 9, 0, 7, 3, 8, 4, 6, 11, 10])
    return _ladder(group, scores, least)


def test_equal_parts_keep_the_best_of_each():
    built = ladder(3)
    assert built.widths == (3, 6, 9, 12)
    assert built.kept(0).tolist() == [3, 7, 10]
    assert built.kept(1).tolist() == [0, 3, 5, 7, 10, 11]
    assert built.block_scores == pytest.approx((22 / 3, 11 / 3, 5 / 3))


def test_widths_follow_multiples_and_minima():
    assert ladder(3, wanted=WidthConstraints(multiple_of=4)).widths == (12,)
    assert ladder(1, 5, WidthConstraints(multiple_of=4)).widths == (8, 12)
    assert ladder(1, wanted=WidthConstraints(4, minimum=5)).widths == (8, 12)
    assert ladder(1, wanted=WidthConstraints(4, min_fraction=0.34)).widths == (8, 12)
    assert ladder(1, wanted=WidthConstraints(5)).widths == (5, 10, 12)
    assert ladder(1, minimum=4, multiple_of=3).widths == (6, 9, 12)
    assert ladder(1, wanted=WidthConstraints(16)).widths == (12,)


def test_global_takes_the_lowest_scores_wherever_they_are(network, graph, example):
    scores = {group.name: torch.ones(group.size) for group in graph.groups}
    scores["inner"] = torch.linspace(0.01, 0.5, 12)
    width_cost = WidthCost(network, example, graph)
    selection = global_ranking(scores, graph, width_cost, limit("macs", 0.8 * width_cost.macs({})))
    assert set(selection) == {"inner"}
    assert selection["inner"].tolist() == list(range(12 - len(selection["inner"]), 12))


def test_uniform_takes_the_same_share(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    selection = uniform(l1(network, graph), graph, width_cost, limit("macs", 0.3 * width_cost.macs({})))
    for group in graph.groups:
        assert len(selection[group.name]) / group.size == pytest.approx(0.53, abs=1.6 / group.size)


def test_per_layer_spares_what_the_loss_needs(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    half = limit("macs", 0.5 * width_cost.macs({}))
    kept = per_layer(l1(network, graph), graph, width_cost, half, loss=removed_share(graph))
    sizes = {group.name: group.size for group in graph.groups}
    shares = {name: len(kept[name]) / sizes[name] if name in kept else 1.0 for name in sizes}
    assert shares["inner"] > 0.85 and shares["stem"] < 0.75


def test_groups_without_scores_stay_whole(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    scores = {"inner": l1(network, graph)["inner"]}
    assert set(global_ranking(scores, graph, width_cost, limit("macs", 0.8 * width_cost.macs({})))) == {"inner"}


@pytest.mark.parametrize("name", NAMES)
def test_out_of_reach_names_the_smallest(network, graph, example, name):
    width_cost = WidthCost(network, example, graph)
    with pytest.raises(BudgetError, match=r"macs.*at the least"):
        find_allocation(name)(l1(network, graph), graph, width_cost, limit("macs", 1200), loss=removed_share(graph))


def test_what_cannot_be_asked_for_is_named(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    half = Limit(metric="macs", percentile=None, value=0.5, relative=True, engine=None)
    with pytest.raises(UsageError, match="absolute"):
        global_ranking(l1(network, graph), graph, width_cost, half)
    with pytest.raises(UsageError, match="memory"):
        global_ranking(l1(network, graph), graph, width_cost, limit("memory", 1e4))
    with pytest.raises(UsageError, match="per_layer measures the loss"):
        per_layer(l1(network, graph), graph, width_cost, limit("macs", 1e5))
    with pytest.raises(StructureError, match="nan"):
        per_layer(l1(network, graph), graph, width_cost, limit("macs", 1e5), loss=lambda selection: float("nan"))
    with pytest.raises(UsageError, match=r"'globl'.*'global'"):
        find_allocation("globl")
