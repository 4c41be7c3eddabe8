"""OPTIN's trajectories: what the distances are blind to, what moves them, and pruning a small vision transformer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.models import create_model
from convette.pruning import find_allocation, score_units, trajectory
from convette.pruning.criteria.optin import (
    _of_heads,
    block_names,
    distillation,
    mean_distance,
    patch_distance,
    relation_distance,
)
from convette.surgery import apply, masked, trace


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.shrink(self.grow(self.norm2(x)).relu())


class Tokens(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8))]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_relations_are_blind_to_rotation_and_length_and_see_a_changed_order(seed):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    lengths = torch.rand(12, 1, generator=generator, dtype=torch.float64) + 0.1
    assert float(relation_distance(f, f)) == pytest.approx(0, abs=1e-9)
    assert float(relation_distance(f, lengths * f @ turn)) == pytest.approx(0, abs=1e-9)
    assert float(relation_distance(f, f.roll(1, 0))) > 1e-3
    order = torch.randperm(12, generator=generator)
    g = f + torch.randn(12, 5, generator=generator, dtype=torch.float64)
    assert float(relation_distance(f[order], g[order])) == pytest.approx(float(relation_distance(f, g)))
    rows = torch.nn.functional.normalize(f, dim=1), torch.nn.functional.normalize(g, dim=1)
    brute = (rows[0] @ rows[0].T - rows[1] @ rows[1].T).square().sum()
    assert float(relation_distance(f, g)) == pytest.approx(float(brute))


def test_distillation_is_zero_for_equals_only():
    logits = torch.randn(6, 4)
    assert float(distillation(logits, logits + 3, 4.0)) == pytest.approx(0, abs=1e-12)
    assert float(distillation(logits, logits.flip(1), 4.0)) > 1e-3


def test_blocks_are_found():
    assert block_names(Tokens()) == ["blocks.0", "blocks.1", "blocks.2"]
    assert block_names(create_model("resnet8")) == ["layer1.0", "layer2.0", "layer3.0"]
    assert block_names(nn.Sequential(nn.Linear(2, 3), nn.ReLU())) == ["0", "1"]


def test_a_unit_that_nobody_reads_is_worth_nothing_and_removing_it_changes_nothing(transformer, data):
    graph = trace(transformer, data[0][0][:1])
    with torch.no_grad():
        transformer.blocks[1].shrink.weight[:, 5] = 0
        transformer.blocks[0].attention.out_proj.weight[:, 4:8] = 0
    scores = trajectory(transformer, graph, data)
    assert set(scores) == {group.name for group in graph}
    assert all((score >= 0).all() for score in scores.values())
    assert scores["blocks.1.grow"][5] < 1e-6 < float(scores["blocks.1.grow"].median())
    heads = scores["blocks.0.attention.in_proj_weight"]
    assert heads[1] < 1e-6 < float(heads[[0, 2, 3]].min())
    before = transformer(data[0][0]).detach()
    apply(transformer, graph.shrink({"blocks.0.attention.in_proj_weight": torch.tensor([0, 2, 3])}))
    assert torch.allclose(transformer(data[0][0]), before, atol=1e-4)


def test_the_score_is_that_of_the_masked_network(transformer, data):
    graph = trace(transformer, data[0][0][:1])
    scores = trajectory(transformer, graph, data, rows=10_000, reduce="mean")
    found = {}

    def features(name):
        def hook(module, args, output):
            found[name] = output.flatten(0, 1)

        return hook

    handles = [transformer.blocks[i].register_forward_hook(features(i)) for i in range(3)]
    with torch.no_grad():
        output, whole = transformer(data[0][0]), dict(found)
        values = []
        for unit in (0, 3):
            kept = torch.tensor([u for u in range(32) if u != unit])
            with masked(transformer, graph, {"blocks.2.grow": kept}):
                changed = transformer(data[0][0])
            values.append(
                (
                    torch.stack([relation_distance(whole[i], found[i]) for i in range(3)]).mean(),
                    distillation(output, changed, 4.0),
                )
            )
    for handle in handles:
        handle.remove()
    # One scale for all: two units give it, and it is a power of ten.
    (bend, shift), (other, moved) = values
    got = [float(scores["blocks.2.grow"][unit]) for unit in (0, 3)]
    scale = (got[0] - float(bend)) / float(shift)
    assert scale == pytest.approx(10 ** round(torch.log10(torch.tensor(scale)).item()), rel=1e-3)
    assert got[1] == pytest.approx(float(other) + scale * float(moved), rel=1e-3)


def test_heads_weigh_half_and_units_may_share_a_mask(transformer, data):
    graph = trace(transformer, data[0][0][:1])
    name = "blocks.0.attention.in_proj_weight"
    assert _of_heads(transformer, graph, name) and not _of_heads(transformer, graph, "blocks.0.grow")
    half, whole = trajectory(transformer, graph, data), trajectory(transformer, graph, data, head_weight=1.0)
    assert torch.allclose(2 * half[name], whole[name]) and torch.equal(half["blocks.0.grow"], whole["blocks.0.grow"])
    shared = trajectory(transformer, graph, data, block=8)["blocks.0.grow"]
    assert all(len(set(part.tolist())) == 1 for part in shared.split(8)) and len(set(shared.tolist())) == 4


def test_what_cannot_be_asked_for_is_named(transformer, data):
    graph = trace(transformer, data[0][0][:1])
    with pytest.raises(UsageError, match=r"reduce = 'men'.*'mean'"):
        score_units("trajectory", transformer, graph, data, options={"reduce": "men"})
    with pytest.raises(UsageError, match="must be positive"):
        trajectory(transformer, graph, data, block=0)


def test_relations_by_place_and_of_means(transformer, data):
    generator = torch.Generator().manual_seed(0)
    f, g = (torch.randn(6, 4, 5, generator=generator) for _ in range(2))
    by_hand = torch.stack([relation_distance(f[:, t], g[:, t]) for t in range(4)]).mean()
    assert torch.allclose(patch_distance(f, g), by_hand) and float(patch_distance(f, f)) < 1e-9
    assert float(mean_distance(f, f)) == 0 < float(mean_distance(f, g))
    assert torch.allclose(mean_distance(3 * f, f), torch.zeros((), dtype=torch.float64), atol=1e-9)
    graph = trace(transformer, data[0][0][:1])
    found = {how: trajectory(transformer, graph, data, relation=how, block=8) for how in ("sampled", "patch", "mean")}
    for scores in found.values():
        assert all((score >= 0).all() and (score > 0).any() for score in scores.values())
    name = "blocks.1.grow"
    orders = {how: scores[name].argsort().tolist() for how, scores in found.items()}
    assert len({tuple(order) for order in orders.values()}) > 1


def test_later_blocks_alone_as_published(transformer, data):
    graph = trace(transformer, data[0][0][:1])
    whole, later = (trajectory(transformer, graph, data, own=own, block=8) for own in (True, False))
    # The block of its own is one term less; the last block, which has none behind it, keeps it.
    assert (later["blocks.0.grow"] < whole["blocks.0.grow"]).all()
    halved = trajectory(transformer, graph, data, last_weight=0.5, block=8)
    assert torch.allclose(2 * halved["blocks.2.grow"], whole["blocks.2.grow"])
    assert torch.equal(halved["blocks.0.grow"], whole["blocks.0.grow"])


def test_heads_and_neurons_of_bert_cost_what_is_published_and_the_cap_is_used_up():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True).eval()
    model = nn.Sequential(layer).eval()
    example = torch.randn(1, 128, 768)
    graph = trace(model, example)
    cost = WidthCost(model, example, graph)
    heads = next(group for group in graph if group.size == 12)
    neurons = next(group for group in graph if group.size == 3072)
    whole = cost.macs({})
    head = whole - cost.macs({heads.name: torch.arange(11)})
    neuron = whole - cost.macs({neurons.name: torch.arange(3071)})
    assert head == 27_262_976 and neuron == 196_608
    assert 12 * (12 * head + 3072 * neuron) == pytest.approx(11.17e9, rel=1e-3)
    limit = Limit("macs", None, 0.6 * whole, False, None)
    scores = {heads.name: torch.rand(12) * 200, neurons.name: torch.rand(3072)}
    selection = find_allocation("exact")(scores, graph, cost, limit)
    assert cost.macs(selection) <= limit.value
    for name, size in ((heads.name, 12), (neurons.name, 3072)):
        kept = set(selection.get(name, torch.arange(size)).tolist())
        if len(kept) < size:
            more = {**selection, name: torch.tensor(sorted({*kept, min(set(range(size)) - kept)}))}
            assert cost.macs(more) > limit.value
