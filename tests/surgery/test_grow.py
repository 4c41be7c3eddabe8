"""Grown networks compute what they computed; growing is data, carries optimisers, and can be taken back bit for bit."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.surgery.nets import OptionAResNet, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError

PIECES = ("conv", "residual", "concat", "depthwise", "grouped", "gate", "chunk", "shuffle", "twice", "literal")


class Piece(nn.Module):
    """One small hard thing; reads and makes `width` channels unless `out` says otherwise."""

    def __init__(self, kind, width, inner):
        super().__init__()
        self.kind, self.inner = kind, inner
        outside = {"concat": 2 * inner, "chunk": 2 * inner, "literal": 2 * inner}.get(kind, inner)
        reads = {"concat": 2 * inner, "twice": 2 * inner}.get(kind, inner)
        self.first = nn.Conv2d(width, outside if kind in ("chunk", "literal") else inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(self.first.out_channels)
        groups = {"depthwise": inner, "grouped": 2}.get(kind, 1)
        self.second = nn.Conv2d(reads, inner, 3, padding=1, groups=groups, bias=kind != "depthwise")
        self.last = nn.Conv2d(inner, width, 1)
        if kind == "concat":
            self.other = nn.Conv2d(width, inner, 1)
        if kind == "gate":
            self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        if self.kind == "concat":
            y = torch.cat([y, self.other(x)], 1)
        elif self.kind == "twice":
            y = torch.cat([y, y], 1)
        elif self.kind == "chunk":
            a, b = y.chunk(2, 1)
            y = a * b
        elif self.kind == "literal":
            a, b = torch.split(y, [self.inner, self.inner], 1)
            y = a + F.relu(b)
        elif self.kind == "shuffle":
            n, c, h, w = y.shape
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.kind == "gate":
            y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.last(F.relu(self.second(y)))
        return x + y if self.kind in ("residual", "gate", "depthwise") else F.relu(y)


class Net(nn.Module):
    def __init__(self, kinds, width=4, inner=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.pieces = nn.Sequential(*[Piece(kind, width, inner) for kind in kinds])
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.pieces(F.relu(self.stem(x))), 2).flatten(1))


def made(kinds, seed=0):
    torch.manual_seed(seed)
    return randomise(Net(kinds)), torch.randn(2, 3, 7, 6)


def same(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(PIECES), min_size=1, max_size=3),
    mode=st.sampled_from(["split", "zero_in", "zero_out"]),
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.0, 0.1]),
    data=st.data(),
)
def test_grown_computes_the_same_replays_and_is_taken_back(kinds, mode, seed, noise, data):
    model, images = made(kinds, seed)
    fresh = made(kinds, seed + 1)[0]
    graph = surgery.trace(model, images)
    names = data.draw(st.lists(st.sampled_from([g.name for g in graph.groups]), min_size=1, unique=True))
    plan = {name: data.draw(st.integers(1, 2 * graph[name].size)) for name in names}
    noise = noise if mode == "split" else 0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
    edit = surgery.grow(graph, plan, mode, seed=seed, noise=noise)
    assert edit.preserves
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    surgery.apply(model, edit, example=images, prove=True)
    with torch.no_grad():
        assert same(model(images), expected)
    wider = surgery.trace(model, images)
    for name, more in plan.items():
        assert wider[name].size == graph[name].size + more
    surgery.replay(fresh, [edit])
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    surgery.apply(model, *surgery.ungrow(wider, edit))
    for name, tensor in model.state_dict().items():
        assert tensor.shape == before[name].shape
        if not noise:
            assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        if not noise:
            assert torch.equal(model(images), expected)


def test_closed_form_count_and_residual_stream():
    torch.manual_seed(0)
    model = randomise(OptionAResNet(blocks=1, width=8))
    images = torch.randn(2, 3, 16, 16)
    graph = surgery.trace(model, images)
    group = graph["layer1.0.conv1"]
    count = sum(p.numel() for p in model.parameters())
    surgery.apply(model, surgery.grow(graph, {group.name: 3}))
    # Three rows of a 3x3 convolution over 8 channels, three norms, three columns of one over 8.
    assert sum(p.numel() for p in model.parameters()) == count + 3 * 8 * 9 + 3 * 2 + 3 * 8 * 9
    for mode in ("split", "zero_in", "zero_out"):
        wide = copy.deepcopy(model)
        graph = surgery.trace(wide, images)
        surgery.apply(wide, surgery.grow(graph, {g.name: 2 for g in graph.groups}, mode), example=images, prove=True)


def test_named_sources_and_new_channels_learn():
    model, images = made(["conv"])
    graph = surgery.trace(model, images)
    name = "pieces.0.first"
    edit = surgery.grow(graph, {name: [2, 2, 0]}, noise=0.1)
    weight = model.pieces[0].first.weight.detach().clone()
    surgery.apply(model, edit)
    assert torch.equal(model.pieces[0].first.weight[4:], weight[[2, 2, 0]])
    for mode in ("zero_in", "zero_out"):
        model, images = made(["conv"])
        surgery.apply(model, surgery.grow(surgery.trace(model, images), {name: 2}, mode))
        rows = model.pieces[0].first.weight.detach().clone()
        columns = model.pieces[0].second.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        # In front of a ReLU, which lets no gradient through at zero, "zero_in" learns nothing; on a stream it does.
        assert not torch.equal(model.pieces[0].second.weight[:, 4:], columns[:, 4:]) or mode == "zero_in"
        assert bool(rows[4:].all()), "in front of a norm that is zero, weights of zero would never learn"
        assert (columns[:, 4:] == 0).all() == (mode == "zero_out")


def test_gradients_optimiser_and_average_are_carried():
    model, images = made(["residual"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    average = copy.deepcopy(model)
    model(images).square().sum().backward()
    graph = surgery.trace(model, images)
    plan = {group.name: 2 for group in graph.groups}
    change = surgery.apply(model, surgery.grow(graph, plan, seed=3))
    change.migrate_optimizer(optimizer)
    change.migrate(average)
    carried = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert same(carried[name], parameter.grad, 1e-4), name
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    with torch.no_grad():
        assert average(images).shape == model(images).shape
    optimizer.step()
    other = surgery.grow(surgery.trace(model, images), {"pieces.0.first": 1}, "zero_out")
    change = surgery.apply(model, other)
    change.migrate_optimizer(optimizer)
    first = model.pieces[0].first.weight
    assert (optimizer.state[first]["exp_avg"][-1] == 0).all()
    assert (optimizer.state[first]["exp_avg"][:-1] != 0).any()


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.conv2(F.relu(self.norm(self.conv1(x)))).mean((2, 3))


def test_statistics_over_channels():
    torch.manual_seed(0)
    model, images = randomise(Normed(nn.GroupNorm(1, 8))), torch.randn(2, 3, 6, 6)
    graph = surgery.trace(model, images)
    with pytest.raises(StructureError, match="group_norm"):
        surgery.grow(graph, {"conv1": 3})
    edit = surgery.grow(graph, {"conv1": 3}, exact=False)
    assert not edit.preserves and surgery.edit_from_json(edit.to_json()) == edit
    # Every unit as often as every other: mean and variance stay.
    assert surgery.grow(graph, {"conv1": 8}).preserves
    assert surgery.grow(graph, {"conv1": 16}).preserves


def test_saved_and_loaded(tmp_path):
    model, images = made(["conv", "gate"])
    surgery.set_origin(model, surgery.Origin("test"))
    graph = surgery.trace(model, images)
    surgery.apply(model, surgery.grow(graph, {group.name: 1 for group in graph.groups}, noise=0.05))
    graph = surgery.trace(model, images)
    surgery.apply(model, graph.shrink({graph.groups[0].name: torch.tensor([0, 2])}))
    surgery.save_model(model, tmp_path / "m.safetensors")
    again = surgery.load_model(tmp_path / "m.safetensors", lambda origin: made(["conv", "gate"], 5)[0])
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.update(mode="explode"),
        lambda v: v.update(seed=-1),
        lambda v: v.update(noise=float("nan")),
        lambda v: v["entries"][0].update(new=[[0, 1 << 40]]),
        lambda v: v["entries"][0].update(source=[0]),
        lambda v: v["entries"][0].update(role="owner"),
        lambda v: v["widened"].update({"pieces.0.first.weight": {"0": 99}}),
        lambda v: v.pop("entries"),
        lambda v: v["entries"][0].update(source=[-1, 0]),
    ],
)
def test_tampered_values_are_refused(damage):
    model, images = made(["conv"])
    value = surgery.grow(surgery.trace(model, images), {"pieces.0.first": 2}).to_json()
    damage(value)
    with pytest.raises(FileFormatError, match="grow") as caught:
        surgery.edit_from_json(value)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_leaves_the_model_alone():
    model, images = made(["conv"])
    edit = surgery.grow(surgery.trace(model, images), {"pieces.0.first": 2})
    small = randomise(Net(["conv"], inner=2))
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with pytest.raises(StructureError):
        surgery.apply(small, edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert not surgery.structure_log(small).edits
    graph = surgery.trace(model, images)
    for plan, mode in (
        ({"nothing": 1}, "split"),
        ({"pieces.0.first": -1}, "split"),
        ({"pieces.0.first": [9]}, "split"),
    ):
        with pytest.raises(StructureError):
            surgery.grow(graph, plan, mode)
    with pytest.raises(StructureError, match="mode"):
        surgery.grow(graph, {"pieces.0.first": 1}, "both")


class Turned(nn.Module):
    """Channels turned round, rotated and taken apart between the layers that make and read them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)
        self.d = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        if self.how == "flipped":
            return self.c(y.flip(1))
        if self.how == "flipped, depthwise":
            return self.c(self.b(y.flip(1)))
        if self.how == "both ways":
            return self.d(torch.cat([y.flip(1), y], 1))
        if self.how == "reversed halves":
            left, right = y.chunk(2, 1)
            return self.c(torch.cat([right.flip(1), left], 1))
        left, right = torch.split(y, [2, y.shape[1] - 2], 1)
        return self.c(torch.cat([right.flip(1), left], 1))


@pytest.mark.parametrize("mode", ["split", "zero_in", "zero_out"])
@pytest.mark.parametrize("how", ["flipped", "flipped, depthwise", "both ways", "reversed halves", "a part flipped"])
def test_channels_that_are_turned_round_grow_in_the_right_place(how, mode):
    torch.manual_seed(1)
    model, images = randomise(Turned(how)), torch.randn(2, 3, 5, 4)
    graph = surgery.trace(model, images)
    group = max(graph, key=lambda group: group.size)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = surgery.grow(graph, {group.name: [0, 0, 2] if group.size > 3 else [0, 2, 2]}, mode)
    assert edit.preserves
    surgery.apply(model, surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))), example=images, prove=True)
    wider = surgery.trace(model, images)
    assert wider[group.name].size == group.size + 3
    surgery.apply(model, *surgery.ungrow(wider, edit))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
