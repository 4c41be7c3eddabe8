"""Parameters are cut exactly, large ones too; indices are data; an edit that fails leaves the model bit for bit."""

import copy

import pytest
import torch
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError
from convette.surgery import Rewrite, Shrink, _slicing
from convette.surgery._cutting import KeptIndices

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_cut_in_pieces(monkeypatch, channels_last, dtype):
    monkeypatch.setattr(_slicing, "_LARGE", 1)
    monkeypatch.setattr(_slicing, "_PIECE", 200)
    tensor = torch.randn(13, 11, 3, 3).to(dtype)
    if channels_last:
        tensor = tensor.to(memory_format=torch.channels_last)
    rows, columns = torch.tensor([0, 3, 4, 9, 12]), torch.tensor([1, 2, 10])
    for dims in ({0: rows, 1: columns}, {1: columns, 0: rows}, {0: rows, 1: columns, 3: torch.tensor([2])}):
        cut = _slicing.sliced(tensor, dims)
        expected = tensor
        for dim, index in dims.items():
            expected = expected.index_select(dim, index)
        assert torch.equal(cut, expected) and cut.dtype == dtype
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert cut.is_contiguous(memory_format=layout)
    for beyond in (torch.tensor([2, 11]), torch.tensor([-1, 2])):
        with pytest.raises(IndexError):
            _slicing.sliced(tensor, {0: rows, 1: beyond})


def test_kept_indices_are_plain_data():
    index = torch.tensor([0, 2, 5])
    kept = KeptIndices({("a.weight", 0): index, ("b.weight", 1): index})
    plain = {("a.weight", 0): (0, 2, 5), ("b.weight", 1): (0, 2, 5)}
    assert kept == plain and dict(kept) == plain and repr(kept) == repr(plain)
    assert kept["a.weight", 0] is kept["b.weight", 1]
    assert copy.deepcopy(kept) == kept
    assert Shrink(kept) == Shrink(plain)
    assert surgery.edit_from_json(Shrink(kept).to_json()) == Shrink(plain)
    with pytest.raises(KeyError):
        kept["c.weight", 0]


def state_of(model):
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors[name] = (tensor, tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    return tensors, attributes, [type(module) for module in model.modules()]


def assert_untouched(model, before):
    tensors, attributes, classes = before
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        old, values, gradient = tensors[name]
        assert tensor is old and torch.equal(tensor, values)
        assert (tensor.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(tensor.grad, gradient)
    for name, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if "structure_log" not in k}.keys() == {
            k for k in attributes[name] if "structure_log" not in k
        }
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    "fault", ["parameter", "index", "nothing left", "attribute", "heads", "rewrite", "second edit"]
)
def test_an_edit_that_fails_leaves_the_model_as_it_was(fault):
    torch.manual_seed(1)
    model = randomise(OptionAResNet())
    model(IMAGES).sum().backward()
    graph = surgery.trace(model, IMAGES)
    good = graph.shrink(half(graph))
    kept, more = dict(good.kept), {}
    if fault == "parameter":
        kept["layer9.weight", 0] = (0,)
    elif fault == "index":
        kept["linear.weight", 1] = (0, 64)
    elif fault == "nothing left":
        kept["linear.weight", 1] = ()
    elif fault == "attribute":
        more = {"attributes": {**good.attributes, "conv1": {"out_chanels": 3}}}
    elif fault == "heads":
        more = {"free_heads": ("conv1",)}
    elif fault == "rewrite":
        more = {"rewrites": (*good.rewrites, Rewrite("layer9", "view", 0, "shape", ((0, 1),)))}
    bad = Shrink(kept, **{"attributes": good.attributes, "rewrites": good.rewrites, **more})
    edits = [good, good] if fault == "second edit" else [bad]
    before = state_of(model)
    with pytest.raises(StructureError):
        surgery.apply(model, *edits)
    assert_untouched(model, before)
    assert surgery.structure_log(model).edits == []
    surgery.apply(model, good)
    assert model(IMAGES).shape == (1, 10)


def test_an_edit_tried_on_shapes_is_taken_back():
    model = randomise(OptionAResNet())
    graph = surgery.trace(model, IMAGES)
    before = state_of(model)
    change = graph.shrink(half(graph)).apply_shapes(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    change.revert()
    assert_untouched(model, before)


def test_shared_parameters_are_cut_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    model.append(model[2])
    model.append(nn.Conv2d(8, 2, 1))
    graph = surgery.trace(model, IMAGES)
    (group,) = graph.groups
    surgery.apply(model, graph.shrink({group.name: torch.arange(3)}), example=IMAGES, prove=True)
    assert model[2] is model[4] and model[2].weight.shape == (3, 3, 1, 1) and model[2].in_channels == 3
