"""Shrunk networks whose forwards were rewritten or whose sizes were changed go through torch.compile and torch.export."""

import copy

import pytest
import torch
from tests.surgery.hard import CASES
from tests.surgery.nets import half, randomise

from convette import surgery

# Sizes in the forward's text, in attributes, heads of nn.MultiheadAttention, a class changed, several literals.
NAMES = [
    "res2net",
    "channel shuffle",
    "attention, fused",
    "nn.MultiheadAttention",
    "dual path",
    "radix attention",
    "flatten to linear and back",
    "zeros concatenated",
]


def shrunk(name):
    torch.manual_seed(3)
    maker, shape = CASES[name]
    # Some makers hand out the same layers every time.
    model = randomise(copy.deepcopy(maker()))
    images = torch.randn(shape)
    graph = surgery.trace(model, images)
    edit = graph.shrink(half(graph))
    surgery.apply(model, edit)
    return model, images, edit


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_exported_it_gives_the_same(name):
    model, images, _ = shrunk(name)
    with torch.no_grad():
        expected = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        assert torch.allclose(compiled(images), expected, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (images,), strict=False)
        assert torch.allclose(program.module()(images), expected, rtol=1e-4, atol=1e-5)


def test_the_networks_above_do_hold_rewritten_forwards_and_changed_attributes():
    edits = [shrunk(name)[2] for name in NAMES]
    assert sum(bool(edit.rewrites) for edit in edits) >= 3
    assert any(edit.free_heads for edit in edits)
    assert (
        sum(
            any(
                set(values) - {"in_channels", "out_channels", "in_features", "out_features", "num_features"}
                for values in edit.attributes.values()
            )
            for edit in edits
        )
        >= 2
    )


def test_exported_to_onnx_a_rewritten_forward_gives_the_same(tmp_path):
    from convette.runtime import export, verify

    model, images, edit = shrunk("dual path")
    assert edit.rewrites
    path = export(model, images[:1], tmp_path / "net.onnx")
    assert verify(path, model, images, tolerance=1e-3).passed
