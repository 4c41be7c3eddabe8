import math

import pytest
import torch

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.pruning import find_allocation, global_ranking, random, uniform
from convette.pruning._reinforce import Reinforce
from convette.pruning.allocation.policy_gradient import weighted_scores


def limit(metric: str, value: float) -> Limit:
    return Limit(metric=metric, percentile=None, value=float(value), relative=False, engine=None)


def spares_inner(graph):
    """A loss that only the inner group matters to: the best is to cut everything else."""
    size = graph["inner"].size
    calls = []

    def loss(selection):
        calls.append(1)
        return 1 - len(selection.get("inner", range(size))) / size

    return loss, calls


@pytest.mark.parametrize("name", ["evolution", "policy_gradient"])
def test_the_search_finds_what_the_loss_asks_for_and_meets_the_limit(network, graph, example, name):
    width_cost = WidthCost(network, example, graph)
    scores, half = random(network, graph, seed=0), limit("macs", 0.5 * width_cost.macs({}))
    loss, calls = spares_inner(graph)
    selection = find_allocation(name)(scores, graph, width_cost, half, loss=loss)
    assert width_cost.macs(selection) <= half.value
    for simple in (uniform, global_ranking):
        assert loss(selection) <= loss(simple(scores, graph, width_cost, half)) + 1e-9
    assert loss(selection) < 0.5 * loss(uniform(scores, graph, width_cost, half))
    assert len(calls) <= 80
    again = find_allocation(name)(scores, graph, width_cost, half, loss=loss)
    assert all(torch.equal(kept, again[group]) for group, kept in selection.items())


@pytest.mark.parametrize("name", ["evolution", "policy_gradient"])
def test_a_loss_is_needed_and_one_that_is_no_number_is_the_worst(network, graph, example, name):
    width_cost = WidthCost(network, example, graph)
    scores, half = random(network, graph, seed=0), limit("macs", 0.5 * width_cost.macs({}))
    with pytest.raises(UsageError, match="measures the loss"):
        find_allocation(name)(scores, graph, width_cost, half)
    size = graph["inner"].size

    def broken(selection):
        return float("nan") if len(selection.get("inner", range(size))) < size - 2 else 1.0

    selection = find_allocation(name)(scores, graph, width_cost, half, loss=broken)
    assert len(selection.get("inner", range(size))) >= size - 2


def test_importances_of_groups_meet_the_budget_and_shift_together(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    scores, half = random(network, graph, seed=0), limit("macs", 0.5 * width_cost.macs({}))
    generator = torch.Generator().manual_seed(0)
    unit = max(width_cost.macs({}) - width_cost.macs({g.name: torch.arange(g.size - 1)}) for g in graph if g.size > 1)
    for _ in range(8):
        z = {group.name: float(torch.randn((), generator=generator)) for group in graph}
        kept = {}
        for shift in (0.0, 1.5):
            factors = {name: math.exp(value + shift) for name, value in z.items()}
            kept[shift] = global_ranking(weighted_scores(scores, factors), graph, width_cost, half)
        assert half.value - unit <= width_cost.macs(kept[0.0]) <= half.value
        assert kept[0.0].keys() == kept[1.5].keys()
        assert all(torch.equal(units, kept[1.5][name]) for name, units in kept[0.0].items())


def test_a_policy_over_scores_starts_from_the_global_ranking_and_learns(network, graph, example):
    width_cost = WidthCost(network, example, graph)
    scores, half = random(network, graph, seed=0), limit("macs", 0.5 * width_cost.macs({}))
    loss, calls = spares_inner(graph)
    search = find_allocation("policy_gradient")
    start = search(scores, graph, width_cost, half, loss=loss, policy="scores", updates=0)
    plain = global_ranking(weighted_scores(scores, {}), graph, width_cost, half)
    assert start.keys() == plain.keys() and all(torch.equal(units, start[name]) for name, units in plain.items())
    found = search(scores, graph, width_cost, half, loss=loss, policy="scores", deviation=0.5, final_deviation=0.1)
    assert width_cost.macs(found) <= half.value and loss(found) < loss(start) and len(calls) <= 80


def test_reinforce_learns_which_arm_pays():
    torch.manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    learner = Reinforce([logits], 0.1, entropy=1e-3)
    pays = torch.tensor([0.0, 1.0, 0.3])
    for _ in range(150):
        choice = torch.distributions.Categorical(logits=logits)
        arms = [choice.sample() for _ in range(4)]
        learner.step([choice.log_prob(arm) for arm in arms], [float(pays[arm]) for arm in arms], choice.entropy())
    assert float(torch.softmax(logits.detach(), 0)[1]) > 0.9
