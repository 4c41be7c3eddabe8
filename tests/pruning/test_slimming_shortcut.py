"""Importance gates: prices, limits, and a residual stream pruned region by region."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette import surgery
from convette.cost import count
from convette.errors import UsageError
from convette.pruning import PruneSettings, importance_gates, prune, score_units
from convette.pruning.criteria._gates import Gates
from convette.pruning.criteria.slimming_shortcut import unit_prices
from convette.surgery import apply, masked, trace


def test_a_price_is_the_share_that_goes_with_a_unit(network, graph, example):
    for metric in ("macs", "parameters"):
        prices = unit_prices(network, graph, metric)
        whole = getattr(count(network, example), metric)
        kept = torch.arange(graph["inner"].size - 1)
        cut = copy.deepcopy(network)
        apply(cut, graph.shrink({"inner": kept}))
        assert prices["inner"] == pytest.approx(1 - getattr(count(cut, example), metric) / whole, rel=1e-9)
    assert sum(unit_prices(network, graph, "none")[g.name] * g.size for g in graph) == pytest.approx(1)


def test_gates_close_when_they_cost_much_and_stay_open_when_they_cost_nothing(network, graph, batches):
    free = importance_gates(network, graph, batches, strength=0.0, steps=60)
    dear = importance_gates(network, graph, batches, strength=1e5, steps=120)
    assert torch.cat(list(dear.values())).max() < 2e-3
    assert torch.cat(list(free.values())).mean() > 0.7


def test_a_dead_unit_closes_first_and_useful_ones_stay(network, graph, batches):
    with torch.no_grad():
        network.outer.weight[:, 4] = 0
        network.head.weight[:, 7] = 0
    scores = importance_gates(network, graph, batches, steps=120)
    assert scores["inner"][4] == 0 and scores["hidden"][7] == 0
    assert scores["inner"].max() > 0.9 and (scores["inner"] > 0.1).sum() >= 8


def test_a_gate_of_zero_is_a_removed_unit(network, graph, batches):
    images = batches[0][0]
    selection = {group.name: torch.arange(1, group.size) for group in graph}
    gated = Gates(network, graph)
    gates = {name: torch.ones(size) for name, size in gated.sizes.items()}
    for gate in gates.values():
        gate[0] = 0
    with masked(network, graph, selection), torch.no_grad():
        expected = network(images)
    assert torch.allclose(gated(gates, images), expected, atol=1e-5)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def test_regions_of_a_stream_are_scored_and_pruned_apart():
    untie = getattr(surgery, "untie", None)
    if untie is None:
        pytest.skip("streams are tied here")
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    network = nn.Sequential(*stem, Block(12), Block(12), *end).eval()
    images = torch.randn(8, 3, 16, 16)
    tied = trace(network, images[:1])
    before = network(images).detach()
    apply(network, untie(tied))
    assert torch.equal(network(images), before)
    graph = trace(network, images[:1])
    assert len(graph.groups) > len(tied.groups)
    scores = score_units("importance_gates", network, graph, [(images, torch.arange(8))], options={"steps": 20})
    assert set(scores) == {group.name for group in graph if group.size}
    selection = {name: score.topk(len(score) // 2).indices.sort().values for name, score in scores.items()}
    with masked(network, graph, selection), torch.no_grad():
        expected = network(images)
    apply(network, graph.shrink(selection))
    assert torch.allclose(network(images), expected, atol=1e-4)
    # A basic block that reads p, has q inside and adds r channels costs 9 H W (p q + q r).
    block = network[3]
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    (p, q), (same, r) = [(m.in_channels, m.out_channels) for m in convolutions]
    costs = [layer.macs for layer in count(network, images[:1]).layers if layer.name.startswith("3.")]
    assert q == same and sum(costs) == 9 * 256 * (p * q + q * r)


def test_it_goes_with_prune_and_bad_choices_are_named(network, graph, batches, example):
    with pytest.raises(UsageError, match=r"cost = 'mac'.*'macs'"):
        score_units("importance_gates", network, graph, batches, options={"cost": "mac"})
    with pytest.raises(UsageError, match="steps=0"):
        importance_gates(network, graph, batches, steps=0)
    with pytest.raises(UsageError, match="importance_gates needs a data set"):
        prune(network, example, "macs<=50%", PruneSettings(criterion="importance_gates", epochs=0))


def test_the_gradient_of_a_gate_is_that_of_what_it_multiplies(network, graph, batches):
    """d L / d g_c = <d L / d out_c, t_c>, with out_c = g_c t_c what the next layer reads."""
    images, labels = batches[0]
    seen: list[torch.Tensor] = []

    def keep(module, args):
        args[0].retain_grad()
        seen.append(args[0])

    handle = network.outer.register_forward_pre_hook(keep)
    F.cross_entropy(network(images), labels).backward()
    handle.remove()
    expected = (seen[0].grad * seen[0].detach()).sum((0, 2, 3))
    gated = Gates(network, graph)
    gates = gated.ones()
    (slope,) = torch.autograd.grad(F.cross_entropy(gated(gates, images), labels), [gates["inner"]])
    assert torch.allclose(slope, expected, rtol=1e-3, atol=1e-6)


def test_a_tied_stream_is_the_special_case_of_equal_regions():
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    network = nn.Sequential(
        *stem, Block(12), Block(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
    ).eval()
    images, kept = torch.randn(2, 3, 8, 8), torch.tensor([0, 2, 3, 7, 11])
    tied, untied = copy.deepcopy(network), copy.deepcopy(network)
    graph = trace(tied, images)
    stream = max(graph, key=lambda group: len(group.of("producer"))).name
    apply(tied, graph.shrink({stream: kept}))
    apply(untied, surgery.untie(trace(untied, images)))
    graph = trace(untied, images)
    apply(untied, graph.shrink({g.name: kept for g in graph if g.size == 12 and "conv1" not in g.name}))
    with torch.no_grad():
        assert torch.allclose(untied(images), tied(images), atol=1e-5)
