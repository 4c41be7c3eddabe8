import pytest
import torch

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.pruning import find_allocation, global_ranking, random, uniform
from convette.pruning._reinforce import Reinforce


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
