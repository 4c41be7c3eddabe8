"""Networks that are not one image in, one tensor out: several inputs, named ones, dataclasses, heads, fixed windows."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import half, randomise
from torch import Tensor, nn

from convette import surgery
from convette.layers._watching import call
from convette.surgery._trace import outputs_of


@dataclasses.dataclass
class Found:
    scores: Tensor
    boxes: list[Tensor]


class TwoInputs(nn.Module):
    """Features of an image beside those of a second one and of a vector; a named switch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.vector, self.head = nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, image, depth, vector=None, twice=False):
        y = F.relu(self.a(image) + self.b(depth))
        if vector is not None:
            y = y * self.vector(vector)[:, :, None, None].sigmoid()
        y = torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)
        return self.head(y) * (2 if twice else 1)


class Detector(nn.Module):
    """A head shared over two maps, its outputs reshaped by anchors and classes, in a dataclass."""

    def __init__(self, anchors=3, classes=4):
        super().__init__()
        self.anchors, self.classes = anchors, classes
        self.stem, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 10, 3, 2, 1)
        self.lateral, self.top = nn.Conv2d(6, 8, 1), nn.Conv2d(10, 8, 1)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(8, anchors * classes, 1), nn.Conv2d(8, anchors * 4, 1)

    def forward(self, x):
        low = F.relu(self.stem(x))
        high = F.relu(self.down(low))
        top = self.top(high)
        maps = [self.lateral(low) + F.interpolate(top, size=low.shape[-2:]), top]
        scores, boxes = [], []
        for features in map(self.tower, maps):
            n, _, h, w = features.shape
            scores.append(
                self.scores(features).view(n, self.anchors, self.classes, h, w).permute(0, 3, 4, 1, 2).flatten(1, 3)
            )
            boxes.append(self.boxes(features).view(n, self.anchors, 4, h, w))
        return Found(torch.cat(scores, 1), boxes)


class Windows(nn.Module):
    """Attention in windows of a fixed size with a table of relative positions, on an image of one size only."""

    def __init__(self, width=8, heads=2, window=4):
        super().__init__()
        self.window, self.heads = window, heads
        self.embed, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.position = nn.Parameter(torch.rand(1, 8, 8, width))
        self.bias = nn.Parameter(torch.rand(heads, window**2, window**2))
        self.qkv, self.proj, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1) + self.position
        n, h, w, c = x.shape
        k = self.window
        t = self.norm(x).view(n, h // k, k, w // k, k, c).transpose(2, 3).reshape(-1, k * k, c)
        q, key, v = self.qkv(t).reshape(len(t), k * k, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ key.transpose(-1, -2) + self.bias).softmax(-1) @ v
        y = self.proj(a.transpose(1, 2).reshape(len(t), k * k, -1))
        y = y.view(n, h // k, w // k, k, k, c).transpose(2, 3).reshape(n, h, w, c)
        return self.head((x + y).mean((1, 2)))


def image(channels=3, side=16):
    return torch.randn(2, channels, side, side, dtype=torch.float64)


CASES = {
    "several inputs": (TwoInputs, lambda: (image(), image(1), torch.randn(2, 5, dtype=torch.float64))),
    "named inputs": (TwoInputs, lambda: {"image": image(), "depth": image(1), "twice": True}),
    "detection head, dataclass": (Detector, image),
    "fixed windows, positions": (Windows, image),
}


@pytest.mark.parametrize("name", CASES)
def test_shrinks_exactly_and_replays(name):
    torch.manual_seed(0)
    maker, inputs = CASES[name]
    model, example = randomise(maker()).double(), inputs()
    fresh = copy.deepcopy(model)
    graph = surgery.trace(model, example)
    assert not graph.frozen and graph.units >= 8
    edit = graph.shrink(half(graph))
    surgery.apply(model, edit, example=example, prove=True, tolerance=1e-10)
    surgery.replay(fresh, [surgery.edit_from_json(json.loads(json.dumps(edit.to_json())))])
    with torch.no_grad():
        ours, theirs = outputs_of(call(model, example), []), outputs_of(call(fresh, example), [])
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    before = sum(p.numel() for p in maker().parameters())
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
