"""Every hard construction: shrunk equals what it must, the edit survives JSON, and the result can be shrunk again."""

import copy
import json

import pytest
import torch
from tests.surgery.hard import CASES
from tests.surgery.nets import half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError


def outputs(model, images):
    with torch.no_grad():
        result = model(images)
    flat = [result] if isinstance(result, torch.Tensor) else [result["low"], *result["top"]]
    return flat


@pytest.mark.parametrize("name", CASES)
def test_shrinks_exactly_twice(name):
    torch.manual_seed(3)
    maker, shape = CASES[name]
    model = randomise(copy.deepcopy(maker())).double()
    images = torch.randn(shape, dtype=torch.float64)
    for seed in (0, 1):
        graph = surgery.trace(model, images)
        assert not graph.frozen, [str(item) for item in graph.frozen]
        assert graph.groups, "nothing to remove"
        before = outputs(model, images)
        edit = graph.shrink(half(graph, seed))
        for a, b in zip(before, outputs(model, images), strict=True):
            assert torch.equal(a, b), "computing an edit leaves a trace"
        again = surgery.edit_from_json(json.loads(json.dumps(edit.to_json())))
        copied = copy.deepcopy(model)
        surgery.apply(model, edit, example=images, prove=True, tolerance=1e-10)
        surgery.apply(copied, again)
        for a, b in zip(outputs(model, images), outputs(copied, images), strict=True):
            assert torch.equal(a, b)
        after = outputs(copy.deepcopy(model), images)
        for a, b, c in zip(before, outputs(model, images), after, strict=True):
            assert a.shape == b.shape and torch.equal(b, c)
        # The batch size is not written into what was rewritten.
        outputs(model, torch.cat([images, images]))
    sum(tensor.sum() for tensor in [*_flat(model(images))]).backward()


def _flat(result):
    return [result] if isinstance(result, torch.Tensor) else [result["low"], *result["top"]]


def test_unknown_function_freezes_and_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.c(torch.fft.fft(self.b(self.a(x)), dim=1).real)

    graph = surgery.trace(Odd(), torch.randn(1, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["a"]
    (frozen,) = graph.frozen
    assert frozen.name == "fft_fft" and "test_hard_cases.py:" in frozen.where
    assert "fixed by fft_fft" in graph.explain("b", 1)


def test_opaque_function_freezes_or_is_refused_but_is_never_wrong():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(x.numpy() ** 2)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(Square.apply(self.a(x)))

    model, images = Odd(), torch.randn(1, 3, 4, 4)
    graph = surgery.trace(model, images)
    for group in graph.groups:
        with pytest.raises(StructureError):
            surgery.apply(model, graph.shrink({group.name: torch.arange(2)}), example=images, prove=True)
    model(images)


def test_a_wrong_guess_in_every_block_is_withdrawn_from_all_at_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            # 20 of 24 channels will stay, 4 times this number: it looks as if it held the width, and does not.
            self.count = 5
            self.inner, self.outer = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            five = torch.arange(self.count) + torch.arange(5)
            y = self.inner(x) * torch.arange(1.0, 25.0) + five.sum()
            return x + self.outer(y.reshape(x.shape))

    model = nn.Sequential(nn.Linear(3, 24), *(Block() for _ in range(9)), nn.Linear(24, 2)).eval()
    tokens = torch.randn(2, 7, 3)
    graph = surgery.trace(model, tokens)
    edit = graph.shrink({"0": torch.arange(20)})
    surgery.apply(model, edit, example=tokens, prove=True)
    assert all(block.count == 5 for block in model[1:-1]) and len(edit.rewrites) == 9
