"""Many selections from one trace: each right for the network as it was traced, sizes looked for once for each set."""

import copy

import pytest
import torch
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError
from convette.surgery import Shrink, _shrinking
from convette.surgery._cutting import KeptIndices

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Sizes in attributes and in the code, a grouped convolution, an attention and a tied layer."""

    def __init__(self):
        super().__init__()
        self.width, self.heads = 12, 4
        self.stem = nn.Conv2d(3, 24, 3, 2)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.norm = nn.GroupNorm(6, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.twice = nn.Linear(24, 24)
        self.again = nn.Linear(24, 24)
        self.again.weight = self.twice.weight
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = self.norm(self.depthwise(self.stem(x)))
        left, right = x[:, : self.width], x[:, 12:]
        x = torch.cat([left, right.relu()], 1)
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.last(self.again(self.twice(x)).mean(1))


class Viewed(nn.Module):
    """A size that follows from how many channels stay, not from which."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.last = nn.Linear(8 * 14 * 14, 5)

    def forward(self, x):
        return self.last(self.stem(x).reshape(-1, 8 * 14 * 14))


def selected(graph, share, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=draw)[: max(1, int(group.size * share))].sort().values
        for group in graph
    }


@pytest.mark.parametrize("make", [Viewed, Written, OptionAResNet])
def test_every_selection_is_right_and_sizes_are_looked_for_once(make, monkeypatch):
    torch.manual_seed(1)
    model = randomise(make()).eval()
    graph = surgery.trace(model, IMAGES)
    looked = []
    probed = _shrinking._probed
    monkeypatch.setattr(_shrinking, "_probed", lambda *args: looked.append(1) or probed(*args))
    runs = []
    for share, seed in ((0.5, 0), (0.5, 1), (0.25, 2), (0.75, 3), (0.5, 4), (0.25, 5)):
        selection = selected(graph, share, seed)
        edit = graph.shrink(selection)
        runs.append(len(looked))
        other = copy.deepcopy(model)
        # Which sizes are set may differ: what is found to be wrong at one width may be right by chance at another.
        assert edit.kept == surgery.trace(other, IMAGES).shrink(selection).kept
        looked[runs[-1] :] = []
        surgery.apply(other, edit, example=IMAGES, prove=True)
        assert surgery.edit_from_json(edit.to_json()) == edit
    if make is Viewed:
        assert runs == [1, 1, 2, 3, 3, 3]
    looked.clear()
    assert graph.shrink(selection) == edit and not looked


def test_what_is_remembered_is_not_handed_out_to_be_changed():
    graph = surgery.trace(randomise(Viewed()).eval(), IMAGES)
    first = graph.shrink(selected(graph, 0.5, 0))
    whole = copy.deepcopy(first.attributes)
    assert whole
    for seed in (0, 1):
        edit = graph.shrink(selected(graph, 0.5, seed))
        assert edit.attributes == whole
        for values in edit.attributes.values():
            assert isinstance(values, dict)
            values.clear()
    assert graph.shrink(selected(graph, 0.5, 2)).attributes == whole


def test_a_graph_speaks_of_the_network_it_traced():
    torch.manual_seed(1)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    whole = copy.deepcopy(model)
    graph = surgery.trace(model, IMAGES)
    surgery.apply(model, graph.shrink({"0": torch.arange(4)}))
    # The same width once more: the shrunk network holds it already, the whole one does not.
    surgery.apply(whole, graph.shrink({"0": torch.arange(4, 8)}), example=IMAGES, prove=True)
    assert whole[0].out_channels == whole[3].in_channels == whole[1].num_features == 4


def test_an_edit_of_a_graph_is_held_to_the_model_it_is_made_on():
    torch.manual_seed(1)
    graph = surgery.trace(randomise(OptionAResNet()), IMAGES)
    edit = graph.shrink(half(graph))
    narrow = randomise(OptionAResNet())
    surgery.apply(narrow, graph.shrink(half(graph, 1)))
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with pytest.raises(StructureError, match="increasing numbers below"):
        surgery.apply(narrow, edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())


@pytest.mark.parametrize("kept", [[0, 2, 2], [2, 0], [-1, 3], [0, 99], []])
def test_a_wrong_group_among_right_ones_is_found(kept):
    graph = surgery.trace(randomise(OptionAResNet()), IMAGES)
    selection = half(graph)
    graph.check(selection)
    for name in (graph.groups[0].name, graph.groups[1].name, graph.groups[-1].name):
        with pytest.raises(StructureError, match=f"group '{name}'"):
            graph.check({**selection, name: torch.tensor(kept, dtype=torch.int64)})


def test_indices_are_made_once_a_list_and_checked_when_they_come_from_elsewhere():
    graph = surgery.trace(randomise(OptionAResNet()), IMAGES)
    edit = graph.shrink(half(graph))
    copied = copy.deepcopy(edit)
    assert isinstance(edit.kept, KeptIndices) and isinstance(copied.kept, KeptIndices)
    assert copied == edit and not copied.kept.last
    assert all(edit.kept.last[id(index)] == int(index[-1]) for index in edit.kept.tensors.values())
    name, dim = next(iter(edit.kept))
    with pytest.raises(StructureError, match="not increasing"):
        Shrink({**edit.kept, (name, dim): (1, 0)}).apply(randomise(OptionAResNet()))
