"""Hierarchical group sparsity: the nine penalties, training with one, and the criterion that measures what it emptied."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from convette.data import load_data
from convette.errors import UsageError
from convette.pruning import loss_increase
from convette.pruning.methods import HierarchicalGroupSparsity, hierarchical_group_penalty, silent_columns
from convette.pruning.methods.hierarchical_group_sparsity import BASES, GROUPINGS, OUTERS, penalised_weights
from convette.surgery import apply, trace
from convette.training import TrainSettings, train

EVERY = [(base, outer) for base in BASES for outer in OUTERS]
DEGREE = {
    ("group_lasso", "flat"): 1,
    ("group_lasso", "sqrt"): 0.5,
    ("group_lasso", "square"): 2,
    ("exclusive", "flat"): 2,
    ("exclusive", "sqrt"): 1,
    ("exclusive", "square"): 4,
    ("half", "flat"): 0.5,
    ("half", "sqrt"): 0.25,
    ("half", "square"): 1,
}


def weight(f: int = 4, c: int = 3, k: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(f, c, k, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("base", "outer"), EVERY)
def test_degree_and_invariances(base, outer):
    w = weight()
    value = hierarchical_group_penalty(w, base, outer)
    assert float(hierarchical_group_penalty(3 * w, base, outer)) == pytest.approx(
        3 ** DEGREE[base, outer] * float(value), rel=1e-5
    )
    shuffled = w[torch.tensor([2, 0, 3, 1])][:, torch.tensor([1, 2, 0])]
    assert torch.allclose(hierarchical_group_penalty(shuffled, base, outer), value, rtol=1e-5)
    swapped = hierarchical_group_penalty(w.transpose(0, 1), base, outer, "neuron")
    assert torch.allclose(swapped, value, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda x: hierarchical_group_penalty(x, base, outer), w.double().requires_grad_())
    zero = torch.zeros_like(w).requires_grad_()
    hierarchical_group_penalty(zero, base, outer).backward()
    assert torch.isfinite(zero.grad).all()


def test_where_kernels_are_single_weights_forms_meet():
    w = weight(k=1)
    assert torch.allclose(
        hierarchical_group_penalty(w, "group_lasso", "square"), hierarchical_group_penalty(w, "exclusive", "flat")
    )
    columns = w.flatten(2).norm(dim=0).sum()
    assert torch.allclose(hierarchical_group_penalty(w, "exclusive", "sqrt"), columns)
    assert torch.allclose(hierarchical_group_penalty(w, "group_lasso", "flat"), columns)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_the_default_lies_between_the_l1_norm_and_as_many_times_that_as_filters(f, c, seed):
    w = weight(f, c, 2, seed)
    value, norm = float(hierarchical_group_penalty(w)), float(w.abs().sum())
    assert norm * (1 - 1e-4) <= value <= f * norm * (1 + 1e-4)
    lonely = torch.zeros_like(w)
    lonely[0] = w[0]
    assert float(hierarchical_group_penalty(lonely)) == pytest.approx(float(w[0].abs().sum()), rel=1e-3)


STRENGTH = 0.005


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def test_training_with_it_empties_input_channels_and_what_they_leave_costs_nothing():
    data = load_data("digits")
    settings_ = TrainSettings(epochs=6, batch_size=32, learning_rate=0.05, augmentation=(), precision="fp32")
    assert list(penalised_weights(network())) == ["2"]
    shares = {}
    for strength in (0.0, STRENGTH):
        method = HierarchicalGroupSparsity(strength)
        found = train(network(), data, settings_, methods=(method,), device="cpu")
        shares[strength] = silent_columns(found.model, 1e-2)
        assert {"hierarchical_group", "weight_l1"} <= set(found.history[-1].terms)
    assert shares[0.0] == 0 and 0.3 < shares[STRENGTH] < 1
    model, images = found.model.eval(), data.preprocessing(data.train.images(slice(0, 64)))
    batches = [(images, data.train.labels[:64])]
    graph = trace(model, images[:1])
    scores = loss_increase(model, graph, batches)["0"]
    emptied = model[2].weight.detach().abs().transpose(0, 1).flatten(1).amax(1) < 1e-2
    assert scores[emptied].abs().max() < 0.02 * scores.max()
    cheap = loss_increase(model, graph, batches, candidates=0.5)["0"]
    assert (cheap == scores).sum() == 6 and cheap[emptied].max() < cheap[~emptied].max()


def test_loss_increase_is_the_loss_without_the_unit_and_nothing_for_one_that_nobody_reads(graph, network_and_batches):
    model, batches = network_and_batches
    with torch.no_grad():
        model.outer.weight[:, 4] = 0
    scores = loss_increase(model, graph, batches)
    assert abs(float(scores["inner"][4])) < 1e-6

    def mean_loss(net):
        with torch.no_grad():
            return float(torch.stack([F.cross_entropy(net(x), y) for x, y in batches]).mean())

    whole = mean_loss(model)
    for group, unit in (("inner", 2), ("stem", 5), ("hidden", 0)):
        cut = copy.deepcopy(model)
        size = next(g.size for g in graph.groups if g.name == group)
        apply(cut, graph.shrink({group: torch.tensor([u for u in range(size) if u != unit])}))
        assert float(scores[group][unit]) == pytest.approx(mean_loss(cut) - whole, abs=1e-5)


@pytest.fixture
def network_and_batches(network, batches):
    return network, batches


def test_what_cannot_be_asked_for_is_named(network, graph, batches):
    with pytest.raises(UsageError, match=r"base='haf'.*'half'"):
        HierarchicalGroupSparsity(base="haf")
    with pytest.raises(UsageError, match="mix=2"):
        HierarchicalGroupSparsity(mix=2)
    with pytest.raises(UsageError, match="no convolution to penalise"):
        penalised_weights(nn.Linear(3, 3))
    with pytest.raises(UsageError, match="candidates=0"):
        loss_increase(network, graph, batches, candidates=0.0)
    assert GROUPINGS == ("feature", "neuron")
