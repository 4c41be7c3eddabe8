import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import Limit, WidthCost
from convette.errors import BudgetError
from convette.pruning import WidthRules, exact, global_ranking, l1, random
from convette.pruning.allocation import build_ladders
from convette.surgery import trace


def limit(metric: str, value: float) -> Limit:
    return Limit(metric=metric, percentile=None, value=float(value), relative=False, engine=None)


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    example = torch.randn(1, 1, 8, 8)
    graph = trace(model, example)
    return model, graph, WidthCost(model, example, graph)


def removed_score(scores, graph, selection) -> float:
    return sum(
        float(scores[group.name].sum() - scores[group.name][selection[group.name]].sum())
        for group in graph.groups
        if group.name in selection
    )


def best_of_all(scores, graph, width_cost, limits) -> float:
    ladders = build_ladders(scores, graph, WidthRules())
    best = float("inf")
    for rungs in itertools.product(*(range(len(ladder.widths)) for ladder in ladders)):
        selection = {ladder.name: ladder.kept(rung) for ladder, rung in zip(ladders, rungs, strict=True)}
        if all(getattr(width_cost, one.metric)(selection) <= one.value for one in limits):
            best = min(best, removed_score(scores, graph, selection))
    return best


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.2, 0.95), seed=st.integers(0, 99), metric=st.sampled_from(["macs", "parameters"]))
def test_it_is_the_best_of_all_selections(chain, share, seed, metric):
    model, graph, width_cost = chain
    scores = random(model, graph, seed=seed)
    bound = limit(metric, share * getattr(width_cost, metric)({}))
    selection = exact(scores, graph, width_cost, bound)
    assert getattr(width_cost, metric)(selection) <= bound.value
    best = best_of_all(scores, graph, width_cost, [bound])
    assert removed_score(scores, graph, selection) == pytest.approx(best, abs=1e-4)


def test_two_limits_and_a_bound_that_is_hit_to_the_last_mac(chain):
    model, graph, width_cost = chain
    scores = random(model, graph, seed=3)
    limits = [limit("macs", 0.5 * width_cost.macs({})), limit("parameters", 0.6 * width_cost.parameters({}))]
    first = exact(scores, graph, width_cost, limits)
    assert removed_score(scores, graph, first) == pytest.approx(best_of_all(scores, graph, width_cost, limits))
    # The same cost as a bound: the optimum may not be lost to a tolerance.
    tight = [limit("macs", width_cost.macs(first)), limit("parameters", width_cost.parameters(first))]
    again = exact(scores, graph, width_cost, tight)
    assert removed_score(scores, graph, again) == pytest.approx(removed_score(scores, graph, first))


def test_no_worse_than_ranking_and_refined_where_there_are_many_widths(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    scores = l1(network, graph)
    half = limit("macs", 0.5 * width_cost.macs({}))
    proven, refined = (
        removed_score(scores, graph, exact(scores, graph, width_cost, half, most_widths=most)) for most in (64, 4)
    )
    ranked = removed_score(scores, graph, global_ranking(scores, graph, width_cost, half))
    assert proven <= refined + 1e-5 <= ranked + 2e-5
    assert refined <= proven + 0.15 * (ranked - proven) + 1e-5


def test_out_of_time_it_still_meets_the_limit(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    half = limit("macs", 0.5 * width_cost.macs({}))
    selection = exact(l1(network, graph), graph, width_cost, half, seconds=0.0)
    assert width_cost.macs(selection) <= half.value


def test_what_cannot_be_reached_names_the_smallest(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    with pytest.raises(BudgetError, match="can go down to"):
        exact(l1(network, graph), graph, width_cost, limit("macs", 10))
