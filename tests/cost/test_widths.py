"""Predicted costs against counts of networks that were really cut, on graphs written by hand.

The cutting here is the test's own (it slices parameters by the members of the graph), so that the room of surgery and
this one can be told apart when something is wrong; tests/cost/test_widths_of_models.py takes the real one.
"""

import copy
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from convette import surgery
from convette.cost import WidthCost, count
from convette.errors import ConvetteError, UsageError


@dataclass
class Graph:
    groups: tuple
    cuts: int = 0

    def shrink(self, selection):
        self.cuts += 1
        return self, selection


def group(name, size, *members, parts=1):
    """Members are (parameter, dim) or (parameter, dim, entries a unit)."""
    made = []
    for parameter, dim, *each in members:
        index = torch.arange(size * (each[0] if each else 1)).reshape(size, -1)
        made.append(SimpleNamespace(parameter=parameter, dim=dim, index=index))
    return SimpleNamespace(name=name, size=size, members=tuple(made), constraints=SimpleNamespace(parts=parts))


def norm(name):
    return [(f"{name}.{tensor}", 0) for tensor in ("weight", "bias", "running_mean", "running_var")]


def cut(model, *edits, example=None):
    for graph, selection in edits:
        gone = {}
        offsets = {}
        for unit in graph.groups:
            kept = selection.get(unit.name, torch.arange(unit.size))
            dropped = torch.tensor(sorted(set(range(unit.size)) - set(kept.tolist())), dtype=torch.long)
            for member in unit.members:
                key = (member.parameter, member.dim)
                start = offsets.get(key, 0)
                offsets[key] = start + member.index.numel()
                gone.setdefault(key, []).append(member.index[dropped].reshape(-1) + start)
        for (name, dim), entries in gone.items():
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            tensor = getattr(owner, attribute)
            keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
            keep[torch.cat(entries)] = False
            smaller = tensor.detach().index_select(dim, keep.nonzero().flatten().to(tensor.device))
            setattr(owner, attribute, nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.groups = module.weight.shape[0]


@pytest.fixture(autouse=True)
def own_cutting(monkeypatch):
    monkeypatch.setattr(surgery, "apply", cut, raising=False)


class Plain(nn.Module):
    """A depthwise convolution, a concatenation, a residual whose block has one group at both ends, a flatten."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.side = nn.Conv2d(8, 6, 1)
        self.joined = nn.Conv2d(14, 10, 1)
        self.tied = nn.Conv2d(10, 10, 3, padding=1)
        self.head = nn.Linear(10 * 16, 4)
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x):
        x = self.depthwise(F.relu(self.stem_norm(self.stem(x))))
        x = self.joined(torch.cat([x, self.side(x)], 1))
        return self.head((x + self.tied(x)).flatten(1))

    graph = Graph(
        (
            group(
                "stem",
                8,
                ("stem.weight", 0),
                *norm("stem_norm"),
                ("depthwise.weight", 0),
                ("depthwise.bias", 0),
                ("side.weight", 1),
                ("joined.weight", 1),
            ),
            group("side", 6, ("side.weight", 0), ("side.bias", 0), ("joined.weight", 1)),
            group(
                "joined",
                10,
                ("joined.weight", 0),
                ("joined.bias", 0),
                ("tied.weight", 0),
                ("tied.bias", 0),
                ("tied.weight", 1),
                ("head.weight", 1, 16),
            ),
        )
    )
    example = torch.randn(2, 3, 4, 4)


class Odd(nn.Module):
    """What does not follow a weight: attention, a convolution over channels, mixing of tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.over_channels = nn.Conv1d(1, 1, 3, padding=1)
        self.query, self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 12)
        self.out = nn.Linear(12 + 8, 5)
        self.mix = nn.Linear(16, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x * self.over_channels(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None]
        tokens = x.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        gram = tokens.transpose(1, 2) @ tokens
        both = torch.cat([attended, tokens], 2)
        return self.out(both), self.mix(both.transpose(1, 2)), gram.sum()

    graph = Graph(
        (
            group(
                "stem",
                8,
                ("stem.weight", 0),
                ("stem.bias", 0),
                *((f"{m}.weight", 1) for m in ("query", "key", "value")),
            ),
            group("query", 6, *((f"{m}.{t}", 0) for m in ("query", "key") for t in ("weight", "bias")), parts=2),
            group("value", 12, ("value.weight", 0), ("value.bias", 0), ("out.weight", 1)),
        )
    )
    # The tokens themselves reach `out` behind the attended ones.
    graph.groups[0].members += group("", 8, ("out.weight", 1)).members
    graph.groups = (graph.groups[1], graph.groups[2], graph.groups[0])
    example = torch.randn(2, 3, 4, 4)


NETWORKS = (Plain, Odd)


def selections(network):
    return st.fixed_dictionaries(
        {
            g.name: st.sets(st.integers(0, g.size - 1), min_size=1).map(lambda kept: torch.tensor(sorted(kept)))
            for g in network.graph.groups
        }
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_predictions_are_exact(network):
    model = network()
    width_cost = WidthCost(model, network.example, network.graph)
    assert width_cost.exact

    @settings(max_examples=25, deadline=None)
    @given(selections(network))
    def check(selection):
        smaller = copy.deepcopy(model)
        cut(smaller, (network.graph, selection))
        cost = count(smaller, network.example)
        assert width_cost.macs(selection) == cost.macs
        assert width_cost.parameters(selection) == cost.parameters
        assert width_cost.size(selection) == cost.size

    check()


@pytest.mark.parametrize("network", NETWORKS)
def test_everything_kept_is_the_count(network):
    model = network()
    width_cost, cost = WidthCost(model, network.example, network.graph), count(model, network.example)
    assert (width_cost.macs({}), width_cost.parameters({}), width_cost.size({})) == (
        cost.macs,
        cost.parameters,
        cost.size,
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("metric", ["macs", "parameters", "size"])
def test_unit_costs_are_what_one_more_unit_saves(network, metric):
    width_cost = WidthCost(network(), network.example, network.graph)
    start = {network.graph.groups[0].name: torch.tensor([0, 2, 3])}
    costs = width_cost.unit_costs(metric, start)
    assert [(name, len(values)) for name, values in costs.items()] == [(g.name, g.size) for g in network.graph.groups]
    for g in network.graph.groups:
        kept = start.get(g.name, torch.arange(g.size))
        one_less = {**start, g.name: kept[:-1]}
        predict = getattr(width_cost, metric)
        assert costs[g.name].eq(predict(start) - predict(one_less)).all()


def test_many_predictions_at_once_are_cheap():
    width_cost = WidthCost(Plain(), Plain.example, Plain.graph)
    widths = torch.stack([torch.randint(1, g.size + 1, (10_000,)) for g in Plain.graph.groups], 1)
    macs = width_cost.predict("macs", widths)
    assert macs.shape == (10_000,) and macs.dtype == torch.int64
    for row in (0, 17, 9_999):
        kept = {name: torch.arange(int(n)) for name, n in zip(width_cost.groups, widths[row], strict=True)}
        assert torch.equal(width_cost.widths(kept), widths[row])
        assert macs[row] == width_cost.macs(kept)
    before = Plain.graph.cuts
    start = time.process_time()
    for _ in range(10_000):
        width_cost.macs(kept)
    # No network is run or cut for it; 10,000 runs would take minutes.
    assert Plain.graph.cuts == before
    assert time.process_time() - start < 30


def test_the_network_stays_as_it_was():
    model = Odd().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    WidthCost(model, Odd.example, Odd.graph)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_plain_network_needs_no_fit():
    graph = Graph(Plain.graph.groups)
    WidthCost(Plain(), Plain.example, graph)
    assert graph.cuts == 2


def test_what_cannot_be_predicted():
    width_cost = WidthCost(Plain(), Plain.example, Plain.graph)
    with pytest.raises(UsageError, match=r"no group of units 'stme'\. Did you mean 'stem'"):
        width_cost.macs({"stme": torch.arange(2)})
    with pytest.raises(UsageError, match="cannot be predicted from widths"):
        width_cost.predict("memory", torch.ones(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="2 widths were given for 3 groups"):
        width_cost.predict("macs", torch.ones(2, dtype=torch.int64))
    with pytest.raises(ConvetteError, match=r"not of this network: stem has 8 entries of stem_norm.weight .* again"):
        WidthCost(Odd(), Odd.example, Plain.graph)


def test_a_network_without_groups():
    model = nn.Linear(3, 4)
    width_cost = WidthCost(model, torch.randn(2, 3), Graph(()))
    assert (width_cost.macs({}), width_cost.parameters({}), width_cost.size({})) == (24, 16, 64)
    assert width_cost.unit_costs("macs") == {}
