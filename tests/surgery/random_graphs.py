"""Random small networks out of everything the label rules know, built from a list of operation names and a seed, and
what must hold of surgery on each: `check`. Used by the tests and, for many more networks, by a benchmark.
"""

import json
import random

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from tests.surgery.nets import half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError


class RandomNet(nn.Module):
    """Applies `operations` in turn to a feature map; every layer is made when the network is built.

    Steps are given the network, so that a copy runs on its own layers.
    """

    def __init__(self, operations, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.steps = []
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.width = 6
        self.add("conv")
        for name in operations:
            self.add(name)
        self.head = nn.Linear(self.width, 3)

    def layer(self, module):
        self.layers.append(module)
        return len(self.layers) - 1

    def conv(self, a, b, k=1, **more):
        return self.layer(nn.Conv2d(a, b, k, padding=k // 2, bias=self.draw.random() < 0.5, **more))

    def add(self, name):
        c = self.width
        even = c % 2 == 0
        if name == "conv":
            out = self.draw.randint(4, 10)
            number = self.conv(3 if not self.steps else c, out, self.draw.choice([1, 3]))
            self.step(out, lambda self, x: self.layers[number](x))
        elif name == "norm":
            kind = self.draw.choice(["batch", "instance", "group"] if even else ["batch", "instance"])
            made = {"batch": nn.BatchNorm2d(c), "instance": nn.InstanceNorm2d(c, affine=True)}
            number = self.layer(made[kind] if kind in made else nn.GroupNorm(2, c))
            self.step(c, lambda self, x: F.relu(self.layers[number](x)))
        elif name == "layernorm":
            number = self.layer(nn.LayerNorm(c))
            self.step(c, lambda self, x: self.layers[number](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        elif name == "residual":
            a, b = self.conv(c, 2 * c, 3), self.conv(2 * c, c)
            self.step(c, lambda self, x: x + self.layers[b](F.silu(self.layers[a](x))))
        elif name == "dense":
            a = self.conv(c, 4, 3)
            self.step(c + 4, lambda self, x: torch.cat([x, F.relu(self.layers[a](x))], 1))
        elif name == "twice":
            self.step(2 * c, lambda self, x: torch.cat([x, x], 1))
        elif name == "split" and c >= 4:
            k = self.draw.randint(2, c - 2)
            a = self.conv(k, k, 3)

            def split(self, x):
                left, right = x.split([k, c - k], 1)
                return torch.cat([right, self.layers[a](left)], 1)

            self.step(c, split)
        elif name == "gate" and even:

            def gate(self, x):
                left, right = x.chunk(2, 1)
                return left * right.sigmoid()

            self.step(c // 2, gate)
        elif name == "shuffle" and even:

            def shuffle(self, x):
                n, c, h, w = x.shape
                return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

            self.step(c, shuffle)
        elif name == "squeeze":
            a, b = self.conv(c, 4), self.conv(4, c)
            self.step(
                c, lambda self, x: x * self.layers[b](F.relu(self.layers[a](x.mean((2, 3), keepdim=True)))).sigmoid()
            )
        elif name == "grouped" and even:
            a = self.conv(c, c, 3, groups=2)
            self.step(c, lambda self, x: self.layers[a](x))
        elif name == "depthwise":
            m = self.draw.choice([1, 2])
            a = self.conv(c, c * m, 3, groups=c)
            self.step(c * m, lambda self, x: self.layers[a](x))
        elif name == "shared":
            a = self.conv(c, c, 3)
            self.step(c, lambda self, x: self.layers[a](F.relu(self.layers[a](x))))
        elif name == "pixels":
            a = self.conv(c, 8)
            self.step(2, lambda self, x: F.max_pool2d(F.pixel_shuffle(self.layers[a](x), 2), 2))
        elif name == "attention":
            a, b = self.layer(nn.Linear(c, 24)), self.layer(nn.Linear(8, c))

            def attention(self, x):
                n, _, h, w = x.shape
                t = self.layers[a](x.flatten(2).transpose(1, 2))
                q, k, v = t.reshape(n, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                return x + self.layers[b](y).transpose(1, 2).reshape(n, -1, h, w)

            self.step(c, attention)
        elif name == "scale":
            self.scales.append(torch.rand(c))
            number = len(self.scales) - 1
            self.step(c, lambda self, x: x * self.scales[number][:, None, None])
        elif name == "pad":
            k = self.draw.randint(1, 3)
            a = self.conv(c, c + 2 * k)
            self.step(c + 2 * k, lambda self, x: F.pad(x, (0, 0, 0, 0, k, k)) + self.layers[a](x))
        elif name == "flat":
            a = self.layer(nn.Linear(16 * c, 12))
            self.step(3, lambda self, x: self.layers[a](F.adaptive_avg_pool2d(x, 4).flatten(1)).view(-1, 3, 2, 2))

    def step(self, width, function):
        self.steps.append(function)
        self.width = width

    def forward(self, x):
        for step in self.steps:
            x = step(self, x)
        return self.head(x.mean((2, 3)))


OPERATIONS = [
    "conv",
    "norm",
    "layernorm",
    "residual",
    "dense",
    "twice",
    "split",
    "gate",
    "shuffle",
    "squeeze",
    "grouped",
    "depthwise",
    "shared",
    "pixels",
    "attention",
    "scale",
    "pad",
    "flat",
]

OPERATION_LISTS = st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=7)
SEEDS = st.integers(0, 1 << 20)
TOLERANCE = 1e-9


def made(operations, seed):
    """Return a network and images for it, in double precision."""
    torch.manual_seed(seed % 1000)
    model = randomise(RandomNet(operations, seed)).double()
    return model, torch.randn(2, 3, 8, 8, dtype=torch.float64)


def values(model):
    """Return copies of all tensors of a network."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def through_json(edits):
    """Return edits as they come back from a file."""
    return [surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) for edit in edits]


@torch.no_grad()
def check(operations, seed):
    """Trace, grow, take back, shrink, replay and fold one network; every step is proved in float64.

    Returns what growing came to: "grown", "refused" (one clear error, the network as before) or "not tried".
    """
    model, images = made(operations, seed)
    before = model(images)
    graph = surgery.trace(model, images)
    assert not graph.frozen, [str(item) for item in graph.frozen]
    assert len({group.name for group in graph}) == len(graph), "two groups of one name"
    owned = set()
    for group in graph:
        for member in group.members:
            keys = {(member.parameter, member.dim, int(index)) for index in member.index.reshape(-1)}
            assert len(keys) == member.index.numel() and not keys & owned, "an entry belongs to two units"
            owned |= keys
    growth = check_grow(model, images, graph, seed)
    edit = graph.shrink(half(graph, seed))
    assert torch.equal(model(images), before), "computing an edit leaves a trace"
    fresh = made(operations, seed)[0]
    surgery.apply(model, edit, example=images, prove=True, tolerance=TOLERANCE)
    # The whole log: growing may have left rewritten forwards behind, on which the shrink builds.
    surgery.replay(fresh, through_json(surgery.structure_log(model).edits))
    got = model(images)
    assert torch.equal(fresh(images), got) and got.shape == before.shape, "a replayed edit is another one"
    folds = surgery.fold_edits(model, images)
    surgery.apply(model, *through_json(folds), example=images, prove=True, tolerance=TOLERANCE)
    return growth


def check_grow(model, images, graph, seed):
    """Grow some groups, compare, replay, take back bit for bit."""
    draw = random.Random(seed)
    names = [group.name for group in graph if draw.random() < 0.4]
    if not names:
        return "not tried"
    before, expected = values(model), model(images)
    mode = draw.choice(["split", "zero_out"])
    # Statistics over channels (layer norm, attention scores) change with the number of channels.
    plan = {name: draw.randint(1, 3) for name in names}
    try:
        edit = surgery.grow(graph, plan, mode, seed=seed, exact=not graph.scopes, tolerance=TOLERANCE)
    except StructureError:
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "refusing left a trace"
        assert torch.equal(model(images), expected)
        return "refused"
    surgery.apply(model, *through_json([edit]))
    grown = model(images)
    error = float((grown - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
    assert grown.shape == expected.shape and (not edit.preserves or error < TOLERANCE), "growing changes the outputs"
    wider = surgery.trace(model, images)
    surgery.apply(model, *surgery.ungrow(wider, edit))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "growing is not taken back"
    assert torch.equal(model(images), expected)
    return "grown"
