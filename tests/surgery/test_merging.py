"""Cuts that follow one another, written as one: the same network, and a smaller file."""

import copy

import pytest
import torch
from tests.surgery.hard import CASES
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.surgery._merging import merged

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_two_cuts_are_one(name):
    torch.manual_seed(3)
    maker, shape = CASES[name]
    model, images = randomise(copy.deepcopy(maker())), torch.randn(shape)
    start = copy.deepcopy(model)
    for seed in (0, 1):
        graph = surgery.trace(model, images)
        # The first leaves some groups alone, so that what one cut touches and the other does not is there too.
        selection = {
            group: kept for number, (group, kept) in enumerate(half(graph, seed).items()) if seed or number % 2
        }
        surgery.apply(model, graph.shrink(selection))
    (edit,) = merged(surgery.structure_log(model).edits)
    surgery.apply(start, surgery.edit_from_json(edit.to_json()))
    ours, theirs = start.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        for a, b in zip(_flat(start(images)), _flat(model(images)), strict=True):
            assert torch.equal(a, b)


def _flat(result):
    return [result] if isinstance(result, torch.Tensor) else [result["low"], *result["top"]]


def test_only_cuts_that_follow_one_another_are_merged_and_only_where_they_fit():
    model = randomise(OptionAResNet(blocks=1))
    first = surgery.trace(model, IMAGES).shrink(half(surgery.trace(model, IMAGES)))
    remove = surgery.Remove("layer1.0")
    slot = next(iter(first.kept))
    far = surgery.Shrink({slot: (len(first.kept[slot]),)})
    for edits in ([], [first], [first, remove, first], [first, far], [remove, remove]):
        assert merged(edits) == edits
    assert len(merged([remove, first, surgery.Shrink({slot: (0,)}), surgery.Shrink({slot: (0,)})])) == 2


class Packed(nn.Module):
    """As layers in few bits keep their weights: bytes beside floats."""

    def __init__(self):
        super().__init__()
        self.net = OptionAResNet(blocks=1)
        self.register_buffer("packed", torch.arange(7, dtype=torch.uint8))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("small", [True, False])
def test_a_file_in_few_bits_holds_its_cuts_as_one(tmp_path, small):
    torch.manual_seed(1)
    model = randomise(Packed() if small else OptionAResNet(blocks=1))
    surgery.set_origin(model, surgery.Origin("test:net"))
    history = tuple({"step": "prune", "macs": float(number)} for number in range(3))
    for seed in range(3):
        graph = surgery.trace(model, IMAGES)
        surgery.apply(model, graph.shrink(half(graph, seed)))
    surgery.set_card(model, surgery.ModelCard(history=history))
    path = tmp_path / "model.safetensors"
    surgery.save_model(model, path)
    assert len(surgery.structure_log(model).edits) == 3, "the network keeps its own record"
    header = surgery.read_header(path)
    assert len(header.edits) == (1 if small else 3) and header.card.history == history
    again = surgery.load_model(path, lambda origin: Packed() if small else OptionAResNet(blocks=1))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert surgery.file_size(again) == path.stat().st_size == surgery.file_size(model)
