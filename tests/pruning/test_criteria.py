import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import StructureError, UsageError
from convette.pruning import CRITERIA, bn_scale, find_criterion, l1, l2, lamp, random, score_units, taylor
from convette.pruning.criteria.lamp import lamp_scores
from convette.surgery import trace

NAMES = sorted(CRITERIA)


def silence(network: nn.Module, graph, group_name: str, unit: int) -> None:
    """Zero everything that makes or reads one unit."""
    group = next(group for group in graph.groups if group.name == group_name)
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        for member in group.members:
            if member.parameter in dict(network.named_parameters()):
                named[member.parameter].index_fill_(member.dim, member.index[unit], 0.0)


# Not those for which a silent unit is nothing special (random, distances), or that rank whole groups.
ZERO_IS_LAST = ["activation_mean", "activation_rank", "apoz", "bn_scale", "fisher", "group_norm", "hessian_trace"]
ZERO_IS_LAST += ["l1", "l2", "lamp", "second_order", "taylor"]


@pytest.mark.parametrize("name", ZERO_IS_LAST)
def test_a_unit_without_weights_is_ranked_last(network, graph, batches, name):
    for group in ("stem", "inner"):
        silence(network, graph, group, 3)
    scores = score_units(name, network, graph, batches)
    for group in ("stem", "inner"):
        assert scores[group][3] == 0
        assert scores[group].argmin() == 3
        assert (scores[group] > 0).sum() == len(scores[group]) - 1


@pytest.mark.parametrize("name", NAMES)
def test_one_finite_score_a_unit(network, graph, batches, name):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    scores = score_units(name, network, graph, batches)
    sizes = {group.name: group.size for group in graph.groups}
    assert scores and all(score.shape == (sizes[group],) for group, score in scores.items())
    assert all(torch.isfinite(score).all() for score in scores.values())
    # A loss may fall without a unit, a learned score may go below 0; everything else counts from there.
    assert name in ("loss_increase", "subsidiary") or all((score >= 0).all() for score in scores.values())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("criterion", [l1, l2, lamp])
@settings(max_examples=15, deadline=None)
@given(factor=st.floats(1e-3, 1e3))
def test_magnitudes_do_not_depend_on_the_scale_of_a_group(criterion, factor):
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1.3, 28).view(7, 4))
    graph = trace(model, torch.ones(2, 4))
    before = criterion(model, graph)["0"]
    with torch.no_grad():
        model[0].weight.mul_(factor)
    assert torch.allclose(criterion(model, graph)["0"], before, rtol=1e-4)


def test_magnitudes_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0], [1.0, 1.0]]))
    graph = trace(model, torch.ones(2, 2))
    assert l1(model, graph, normalise="none")["0"].tolist() == pytest.approx([7, 1, 2])
    assert l2(model, graph, normalise="none")["0"].tolist() == pytest.approx([5, 1, math.sqrt(2)])
    assert l1(model, graph)["0"].tolist() == pytest.approx([2.1, 0.3, 0.6])
    assert l1(model, graph, normalise="max")["0"].tolist() == pytest.approx([1, 1 / 7, 2 / 7])


def test_aggregate_mean_gives_every_layer_of_a_stream_equal_say(network, graph):
    before = {how: l1(network, graph, aggregate=how)["stem"] for how in ("norm", "mean", "max")}
    with torch.no_grad():
        network.outer.weight.mul_(50)
    after = {how: l1(network, graph, aggregate=how)["stem"] for how in ("norm", "mean", "max")}
    assert torch.allclose(after["mean"], before["mean"], rtol=1e-4)
    assert torch.allclose(after["max"], before["max"], rtol=1e-4)
    assert not torch.allclose(after["norm"], before["norm"], rtol=1e-2)


def test_lamp_by_hand():
    assert lamp_scores(torch.tensor([9.0, 1.0, 4.0])).tolist() == pytest.approx([1, 1 / 14, 4 / 13])
    assert lamp_scores(torch.tensor([2.0, 2.0])).tolist() == pytest.approx([0.5, 1])
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_lamp_keeps_the_order_of_magnitudes_and_tops_at_one(squares):
    values = torch.tensor(squares, dtype=torch.float64)
    scores = lamp_scores(values)
    order = values.argsort(stable=True)
    assert (scores[order].diff() >= -1e-12).all()
    assert scores.max() == (1 if values.max() > 0 else 0)


def test_taylor_is_the_change_of_a_loss_that_is_linear_in_the_readers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))
    inputs = torch.randn(9, 4)
    graph = trace(model, inputs)

    def loss(outputs, labels):
        return outputs.mean()

    scores = taylor(model, graph, [(inputs, torch.zeros(9))], loss=loss)["0"]
    whole = loss(model(inputs), None)
    for unit in range(5):
        kept = model[2].weight.detach().clone()
        with torch.no_grad():
            model[2].weight[:, unit] = 0
            change = loss(model(inputs), None) - whole
            model[2].weight.copy_(kept)
        assert float(scores[unit]) == pytest.approx(abs(float(change)), rel=1e-4)


def test_taylor_leaves_gradients_and_flags_alone(network, graph, batches):
    network.train()
    network.norm.eval()
    network.stem.weight.requires_grad_(False)
    network.head.weight.grad = torch.ones_like(network.head.weight)
    taylor(network, graph, batches)
    assert network.training and not network.norm.training
    assert not network.stem.weight.requires_grad and network.inner.weight.requires_grad
    assert network.inner.weight.grad is None and (network.head.weight.grad == 1).all()


def test_bn_scale_is_the_absolute_scale(network, graph):
    with torch.no_grad():
        network.inner_norm.weight.neg_()
    assert torch.allclose(bn_scale(network, graph)["inner"], network.inner_norm.weight.detach().abs())
    stream = (network.norm.weight.abs() + network.outer_norm.weight.abs()) / 2
    assert torch.allclose(bn_scale(network, graph)["stem"], stream.detach())
    assert "hidden" not in bn_scale(network, graph)


def test_bn_scale_without_norms_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(UsageError, match="bn_scale"):
        bn_scale(model, trace(model, torch.ones(2, 4)))


def test_random_depends_on_seed_and_group_only(network, graph):
    first = random(network, graph, seed=3)
    torch.rand(5)
    with torch.no_grad():
        network.stem.weight.zero_()
    again = random(network, graph, seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem"], random(network, graph, seed=4)["stem"])


@pytest.mark.parametrize("name", ["l1", "l2", "lamp", "bn_scale", "taylor"])
def test_scores_follow_the_units_when_they_change_places(network, graph, batches, name):
    before = score_units(name, network, graph, batches)["inner"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.inner.weight.copy_(network.inner.weight[order])
        for tensor in (
            *network.inner_norm.parameters(),
            network.inner_norm.running_mean,
            network.inner_norm.running_var,
        ):
            tensor.copy_(tensor[order])
        network.outer.weight.copy_(network.outer.weight[:, order])
    assert torch.allclose(score_units(name, network, graph, batches)["inner"], before[order], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["l1", "l2", "lamp", "taylor", "bn_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named(network, graph, batches, name, value):
    with torch.no_grad():
        network.inner.weight[5, 0, 0, 0] = value
        network.inner_norm.weight[5] = value
    with pytest.raises(StructureError, match=rf"{name}.*(inner|stem|wide|hidden)"):
        score_units(name, network, graph, batches)


def test_what_cannot_be_asked_for_is_named(network, graph, batches):
    with pytest.raises(UsageError, match=r"criterion 'tailor'.*'taylor'"):
        find_criterion("tailor")
    with pytest.raises(UsageError, match=r"l1 has no option 'agregate'.*'aggregate'"):
        score_units("l1", network, graph, options={"agregate": "mean"})
    with pytest.raises(UsageError, match=r"normalise = 'men' is unknown.*'mean'"):
        score_units("l1", network, graph, options={"normalise": "men"})
    for nothing in (None, []):
        with pytest.raises(UsageError, match="taylor needs calibration"):
            score_units("taylor", network, graph, nothing)
