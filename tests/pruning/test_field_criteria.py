"""The criteria of the field: second order, activations, distances; and what all criteria leave as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette.errors import StructureError, UsageError
from convette.pruning import (
    CRITERIA,
    activation_mean,
    activation_rank,
    apoz,
    fisher,
    geometric_median,
    group_norm,
    hessian_trace,
    score_units,
    second_order,
)
from convette.pruning.criteria import NEED_DATA
from convette.pruning.criteria._gates import Gates
from convette.pruning.criteria._observing import find_readers, sample_saliencies
from convette.surgery import trace

# Two of the criteria run networks by the hundred: little of each will do here.
LITTLE = {
    "blend": {"generations": 1, "population": 3, "probe": 2, "pool": "l1, taylor"},
    "importance_gates": {"steps": 4},
}
OWN = sorted(name for name, home in CRITERIA.items() if home.startswith("convette.pruning.criteria."))


class Attention(nn.Module):
    """A token network with PyTorch's own attention and grouped, depthwise and flattened readers before it."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.grouped = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.flat = nn.Linear(4 * 6, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.flat(self.depthwise(self.grouped(x)).flatten(1)).relu()
        axis = 1 if self.attention.batch_first else 0
        tokens = torch.stack([x, x**2], dim=axis)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(axis))


@pytest.fixture(params=[True, False])
def attention(request):
    torch.manual_seed(0)
    return Attention(request.param).eval()


def two_layers(units: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 3))


def squares(outputs, targets):
    return F.mse_loss(outputs, targets)


def test_second_order_is_exact_where_the_loss_is_quadratic_in_the_units():
    model = two_layers()
    inputs, targets = torch.randn(20, 4), torch.randn(20, 3)
    graph = trace(model, inputs)
    options = {"loss": squares, "signed": True}
    scores = second_order(model, graph, [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])], exact=True, **options)
    whole = squares(model(inputs), targets)
    for unit in range(6):
        kept = model[2].weight.detach().clone()
        with torch.no_grad():
            model[2].weight[:, unit] = 0
            change = float(squares(model(inputs), targets) - whole)
            model[2].weight.copy_(kept)
        assert float(scores["0"][unit]) == pytest.approx(change, rel=1e-4, abs=1e-7)


def test_random_probes_come_to_the_exact_second_derivatives(network, graph, batches):
    exact = second_order(network, graph, batches, exact=True)
    probed = second_order(network, graph, batches, probes=60)
    every = torch.cat([exact[name] - probed[name] for name in exact])
    assert every.abs().mean() < 0.1 * torch.cat(list(exact.values())).abs().mean()
    assert torch.equal(probed["inner"], second_order(network, graph, batches, probes=60)["inner"])


def test_hessian_trace_of_a_quadratic_by_hand():
    # With y = w x and the squared error, the Hessian of each row of w is 2 x x^T over its outputs.
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))
    inputs = torch.randn(30, 3)
    graph = trace(model, inputs)
    scores = hessian_trace(model, graph, [(inputs, torch.zeros(30, 2))], loss=squares, probes=400)["0"]
    reads = model[1].weight.detach().square().sum(dim=0)  # what a unit of output is worth, squared
    curvature = inputs.square().mean(dim=0).sum() * reads * 2 / 2
    expected = curvature / (2 * 3) * model[0].weight.detach().square().sum(dim=1)
    assert torch.allclose(scores, expected, rtol=0.15)


def test_a_saliency_is_the_derivative_by_the_gate(attention):
    images, labels = torch.randn(3, 1, 8, 9), torch.tensor([1, 2, 3])
    graph = trace(attention, images)
    (found,) = sample_saliencies(attention, graph, [(images, labels)], F.cross_entropy, "test")
    gated = Gates(attention, graph)
    gates = gated.ones()
    with torch.no_grad():
        assert torch.allclose(gated(gates, images), attention(images), atol=1e-6)
    torch.backends.mha.set_fastpath_enabled(False)
    slopes = torch.autograd.grad(F.cross_entropy(gated(gates, images), labels), list(gates.values()))
    torch.backends.mha.set_fastpath_enabled(True)
    watched = {name for name, readers in find_readers(attention, graph).items() if readers[0].through != "output"}
    assert {"grouped.0", "grouped.2", "depthwise.2", "flat", "attention.in_proj_weight"} & set(gates) <= set(found)
    assert any(reader.through == "heads" for readers in find_readers(attention, graph).values() for reader in readers)
    for name, slope in zip(gates, slopes, strict=True):
        if name in watched:
            assert torch.allclose(found[name].sum(dim=0) / 3, slope, atol=1e-5), name


def test_fisher_is_half_the_mean_square(network, graph, batches):
    scores = fisher(network, graph, batches)
    rows = list(sample_saliencies(network, graph, batches, F.cross_entropy, "test"))
    for name, score in scores.items():
        every = torch.cat([found[name] for found in rows])
        assert torch.allclose(score, every.square().mean(dim=0) / 2, rtol=1e-4)
    singly = fisher(network, graph, [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))])
    assert all(torch.allclose(singly[name], score, rtol=1e-3, atol=1e-9) for name, score in scores.items())


def test_geometric_median_finds_what_others_carry():
    model = two_layers(5)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 9, 0]]))
    graph = trace(model, torch.ones(1, 4))
    scores = geometric_median(model, graph, normalise="none")["0"]
    rows = model[0].weight.detach()
    brute = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    assert torch.allclose(scores, brute) and set(scores.argsort()[:2].tolist()) == {2, 3}


def test_group_norm_by_hand(network, graph):
    score = group_norm(network, graph, normalise="none")["inner"]
    parts = [network.inner.weight.square().sum((1, 2, 3)), network.outer.weight.square().sum((0, 2, 3))]
    parts += [network.inner_norm.weight.square(), network.inner_norm.bias.square()]
    assert torch.allclose(score, sum(parts).detach().sqrt(), rtol=1e-5)


def test_activations_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1))
    maps = torch.zeros(2, 1, 4, 4)
    maps[0, 0] = torch.tensor([1.0, 2, 0, 0]).outer(torch.tensor([1.0, 1, 3, 1]))  # rank 1, half of it positive
    maps[1, 0] = torch.eye(4)
    data = [(maps, torch.tensor([0, 1]))]
    graph = trace(model, maps)
    assert apoz(model, graph, data)["0"].tolist() == pytest.approx([(8 + 4) / 32, 0, (8 + 4) / 32])
    assert activation_rank(model, graph, data, relative=False)["0"].tolist() == [2.5, 0, 2.5]
    assert activation_rank(model, graph, data)["0"].tolist() == [0.625, 0, 0.625]
    loud = activation_mean(model, graph, data, normalise="none")["0"]
    assert loud.tolist() == pytest.approx([22 / 32, 0, 44 / 32])


@pytest.mark.parametrize("name", OWN)
def test_a_criterion_leaves_the_network_as_it_was(network, graph, batches, name):
    network.train()
    network.norm.eval()
    network.stem.weight.requires_grad_(False)
    network.head.weight.grad = torch.ones_like(network.head.weight)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scores = score_units(name, network, graph, batches, options=LITTLE.get(name))
    assert torch.equal(torch.rand(3), expected), "the random state moved"
    assert flags == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()].count(False) == 1 and not network.stem.weight.requires_grad
    assert network.inner.weight.grad is None and (network.head.weight.grad == 1).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any(value.requires_grad for value in scores.values())


@pytest.mark.parametrize("name", OWN)
def test_attention_heads_and_groups_are_scored(attention, name):
    images, labels = torch.randn(6, 1, 8, 9), torch.arange(6)
    graph = trace(attention, images)
    if name == "bn_scale":
        pytest.skip("there is no norm in it")
    scores = score_units(name, attention, graph, [(images, labels)], options=LITTLE.get(name))
    sizes = {group.name: group.size for group in graph.groups}
    assert {"grouped.0", "grouped.2", "flat", "attention.in_proj_weight"} <= set(scores)
    assert all(score.shape == (sizes[group],) and torch.isfinite(score).all() for group, score in scores.items())


@pytest.mark.parametrize("name", sorted(NEED_DATA & set(OWN)))
def test_poor_calibration_data_gives_numbers_or_one_line(network, graph, name):
    one = [(torch.randn(1, 1, 9, 8), torch.tensor([3]))]
    constant = [(torch.zeros(5, 1, 9, 8), torch.arange(5))]
    for data in (one, constant):
        try:
            scores = score_units(name, network, graph, data, options=LITTLE.get(name))
        except UsageError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            assert all(torch.isfinite(score).all() for score in scores.values())
    with pytest.raises(StructureError, match="taylor" if name == "blend" else name):
        score_units(name, network, graph, [(torch.full((2, 1, 9, 8), torch.nan), torch.tensor([0, 1]))])
    for nothing in (None, []):
        with pytest.raises(UsageError, match=f"{name} needs calibration"):
            score_units(name, network, graph, nothing)


def test_the_table_of_criteria_lists_them_all():
    table = (Path(__file__).parents[2] / "docs/systems/pruning/criteria.md").read_text()
    assert [name for name in CRITERIA if f"`{name}`" not in table] == []
