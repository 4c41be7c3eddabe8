"""A trace without values finds what a trace with values finds, asks for values where it must, and leaves nothing."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.surgery.hard import CASES
from tests.surgery.nets import half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError
from convette.surgery._comparing import difference
from convette.surgery._shapes import SHAPES
from convette.surgery._walk import Kept, Walk

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ZOO = {
    "torchvision:shufflenet_v2_x0_5": 40,
    "torchvision:regnet_y_400mf": 40,
    "torchvision:convnext_tiny": 40,
    "torchvision:squeezenet1_1": 40,
    "torchvision:deeplabv3_mobilenet_v3_large": 40,
    "timm:test_resnet": 40,
    "timm:test_nfnet": 40,
    "timm:test_vit": 160,
    "timm:levit_128s": 224,
    "timm:ghostnet_050": 40,
    "timm:mobileone_s0": 40,
    "timm:resnest14d": 40,
    "timm:swin_tiny_patch4_window7_224": 224,
}


def build(name):
    home, leaf = name.split(":")
    if home == "timm":
        import timm

        return timm.create_model(leaf).eval()
    import torchvision

    backbone = {"weights_backbone": None} if "lab" in leaf else {}
    return torchvision.models.get_model(leaf, **backbone).eval()


def same_both_ways(model, example):
    without = surgery.trace(model, example)
    with_ = surgery.trace(model, example, values=True)
    assert difference(without, with_) == ""
    return without


@pytest.mark.parametrize("name", CASES)
def test_hard_constructions_agree(name):
    torch.manual_seed(3)
    maker, shape = CASES[name]
    graph = same_both_ways(randomise(copy.deepcopy(maker())).double(), torch.randn(shape, dtype=torch.float64))
    assert graph.records.needed == ""


@pytest.mark.parametrize("name", ZOO)
def test_networks_agree_and_need_no_values(name):
    model = build(name)
    graph = same_both_ways(model, torch.randn(1, 3, ZOO[name], ZOO[name]))
    assert graph.records.needed == ""
    copy.deepcopy(model)


class Two(nn.Module):
    """Two convolutions with something in between that looks at values."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def caught(x):
    try:
        return x * float(x.abs().max())
    except RuntimeError:
        return x[:, :4].repeat(1, 2, 1, 1)


LOOKS = {
    "truth": lambda x: x if x.sum() == x.sum() else x.flip(1),
    "number": lambda x: x * x.mean().item(),
    "caught": caught,
    "mask": lambda x: x * (x[x > x.min()].numel() > 0),
    "index": lambda x: x[:, :, x.mean((0, 1, 3)).topk(3).indices],
    "nonzero": lambda x: x[:, :, torch.nonzero(x[0, 0, :, 0] == x[0, 0, :, 0])[:, 0]],
    "numpy": lambda x: x * float(np.asarray(x.detach()).size),
    "gather": lambda x: x.gather(2, x.argsort(2)),
    "range": lambda x: x + torch.arange(int(x.abs().sum() > 0), 17)[:16].float(),
    "into a constant": lambda x: torch.zeros(1, 8, 16, 16).copy_(x),
    "written into zeros": lambda x: _written(x),
}


def _written(x):
    out = torch.zeros(x.shape)
    out[:, 1:] = x[:, :-1]
    return out


@pytest.mark.parametrize("name", LOOKS)
def test_whoever_looks_at_values_gets_them(name):
    torch.manual_seed(0)
    model = Two(LOOKS[name]).eval()
    state = torch.get_rng_state()
    graph = same_both_ways(model, IMAGES)
    assert graph.records.needed
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_are_drawn_once():
    def noisy(x):
        x = x + torch.rand(1)
        return x if x.sum() > -1e9 else -x

    model = Two(noisy).eval()
    torch.manual_seed(5)
    assert surgery.trace(model, IMAGES).records.needed
    drawn = torch.rand(1)
    torch.manual_seed(5)
    torch.rand(1)
    assert torch.equal(drawn, torch.rand(1))


class Hoarder(nn.Module):
    """Keeps what it computes, in an attribute, a list, a dict and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.last, self.seen, self.bias_cache = None, [], {"old": torch.ones(1)}
        self.register_buffer("kept", torch.zeros(1))

    def forward(self, x):
        y = self.conv(x)
        self.last = y
        self.seen.append(y)
        self.bias_cache["new"] = y
        self.kept = y.mean()
        self.extra = y
        return self.head(y)


@pytest.mark.parametrize("values", [False, True])
def test_a_trace_leaves_nothing_on_the_model(values):
    model = Hoarder()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    graph = surgery.trace(model, IMAGES, values=values)
    graph.shrink(half(graph))
    assert model.last is None and model.seen == [] and list(model.bias_cache) == ["old"]
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0] and torch.equal(tensor, tensors[name][1])
        assert not vars(tensor)
    copy.deepcopy(model)


def test_walk_lists_what_pytorch_lists():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.append(model[0])
    model.tied = model[0].weight
    walk = Walk(model)
    assert list(walk.names.values()) == [name for name, _ in model.named_modules()]
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert list(walk.tensors.values()) == names
    assert walk.shared and not Walk(nn.Linear(2, 2)).shared
    assert walk.module("2") is model[0] and walk.find("2.weight") is model[0].weight
    hoarder = Hoarder()
    kept = Kept(Walk(hoarder))
    hoarder.added, hoarder.last = 3, 4
    kept.restore()
    assert not hasattr(hoarder, "added") and hoarder.last is None


CALLS = [
    (F.conv2d, "conv2d", [(2, 6, 9, 8), (4, 3, 3, 2), (4,)], [(2, 1), (1, 0), (1, 2), 2]),
    (F.conv1d, "conv1d", [(2, 6, 9), (4, 6, 3)], [None, 2, 1]),
    (F.conv3d, "conv3d", [(1, 2, 5, 6, 7), (3, 2, 1, 2, 3), (3,)], [1, (0, 1, 2)]),
    (F.linear, "linear", [(2, 5, 6), (3, 6), (3,)], []),
    (F.max_pool2d, "max_pool2d", [(2, 3, 9, 8)], [3, 2, 1]),
    (F.adaptive_avg_pool2d, "adaptive_avg_pool2d", [(2, 3, 9, 8)], [(None, 2)]),
    (torch.mean, "mean", [(2, 3, 4, 5)], [(2, -1), True]),
    (torch.mean, "mean", [(2, 3, 4, 5)], [1]),
    (torch.matmul, "matmul", [(2, 3, 4, 5), (2, 3, 5, 6)], []),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[1])
def test_shapes_are_those_of_pytorch(call):
    function, name, shapes, rest = call
    tensors = [torch.randn(shape) for shape in shapes]
    assert SHAPES[name](*tensors, *rest) == tuple(function(*tensors, *rest).shape)


def test_shapes_that_do_not_fit_are_not_guessed():
    x = torch.randn(1, 6, 8, 8)
    assert SHAPES["conv2d"](x, torch.randn(4, 5, 3, 3)) is None
    assert SHAPES["conv2d"](x, torch.randn(4, 6, 9, 9)) is None
    assert SHAPES["conv2d"](x, torch.randn(4, 6, 3, 3), torch.randn(3)) is None
    assert SHAPES["conv2d"](x, torch.randn(4, 6, 3, 3), None, 1, "same") is None
    assert SHAPES["cat"]([x, torch.randn(1, 2, 8, 9)], 1) is None
    assert SHAPES["cat"]([x, torch.randn(1, 2, 8, 8)], -3) == (1, 8, 8, 8)
    assert SHAPES["linear"](x, torch.randn(3, 6)) is None
    assert SHAPES["matmul"](x, torch.randn(1, 1, 8, 8)) is None
    assert SHAPES["mean"](x) is None and SHAPES["mean"](x, 4) is None
    with pytest.raises(StructureError, match="does not run on the example"):
        surgery.trace(Two(lambda x: x[:, :5]).eval(), IMAGES)


class Remembering(nn.Module):
    """Keeps a table for each device it has seen, as timm's attention does, and has a statistic over channels after."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.table = nn.Parameter(torch.randn(3, 5))
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 2)
        self.bias_cache = {}

    def forward(self, x):
        key = str(x.device)
        if key not in self.bias_cache:
            self.bias_cache[key] = self.table[:, [0, 2]].sum()
        return self.last(self.norm(self.first(x) + self.bias_cache[key]))


def test_a_proof_holds_for_a_network_that_has_run_before():
    model = Remembering().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    graph = surgery.trace(model, x)
    surgery.apply(model, graph.shrink({"first": torch.arange(5)}), example=x, prove=True)
    assert model.first.weight.shape == (5, 4)
