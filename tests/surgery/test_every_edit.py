"""What every kind of edit has to hold to: data that is written and read, replayed, taken back, carried along, proved."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError
from convette.layers.normalization.bnet import BNET2d
from convette.surgery._edits_json import _KINDS

IMAGES = torch.randn(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))


class Gamma(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


class Branches(nn.Module):
    """Two branches, and it knows what one convolution they are."""

    def __init__(self):
        super().__init__()
        self.three, self.one = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.three(x) + (self.one(x) if self.one is not None else 0)

    def fuse(self):
        self.three.weight[:, :, 1:2, 1:2] += self.one.weight
        self.three.bias += self.one.bias
        self.one = None


class Absorbing(nn.Conv2d):
    def absorb(self, norm):
        made = nn.Conv2d(8, 8, 1)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        with torch.no_grad():
            made.weight.copy_(self.weight * scale[:, None, None, None])
            made.bias.copy_((self.bias - norm.running_mean) * scale + norm.bias)
        return made


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.narrow, self.wide = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.scaled, self.gamma = nn.Conv2d(8, 8, 1), Gamma()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.branches, self.taking, self.taken = Branches(), Absorbing(8, 8, 1), nn.BatchNorm2d(8)
        self.bnet, self.head = BNET2d(8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.wide(self.narrow(x)))
        x = self.act(self.gamma(self.scaled(x)))
        x = self.act(self.left(x) + self.right(x))
        x = self.act(self.branches(self.blocks(x)))
        x = self.act(self.bnet(self.act(self.taken(self.taking(x)))))
        return self.head(x.mean((2, 3)))


def made():
    torch.manual_seed(0)
    return randomise(Net())


def edits_of(model):
    """Return an edit of every kind that fits `model`."""
    graph = surgery.trace(model, IMAGES)
    grown = surgery.grow(graph, {"blocks.0.conv1": 2})
    further = {edit.kind: edit for edit in surgery.further_folds(model, IMAGES)}
    return {
        "shrink": graph.shrink({"blocks.0.conv1": torch.tensor([0, 2, 5]), "stem": torch.tensor([1, 3, 4, 7])}),
        "grow": grown,
        "scale": surgery.Scale({("wide.weight", 0): ((2, 0.5),)}),
        "convert": surgery.Convert("norm", "torch.nn:GroupNorm", {"num_groups": 2, "num_channels": 8}),
        "append": surgery.Append("act", "torch.nn:Dropout", {"p": 0.25}),
        "insert": surgery.insert(model, "wide", IMAGES),
        "install": surgery.Install(
            "convette.layers.normalization.filtered_batch_norm:filter_batch_norm", {"threshold": 3.0}
        ),
        "remove": surgery.remove(model, "blocks.1", IMAGES),
        "fold": surgery.Fold("stem", "norm"),
        "absorb": surgery.Absorb("taking", "taken"),
        "fold_layer": surgery.fold_layers(copy.deepcopy(model), IMAGES)[0],
        "fold_convs": further["fold_convs"],
        "fold_scale": further["fold_scale"],
        "merge": surgery.Merge("left", ("right",)),
        "reparameterize": surgery.reparameterize(copy.deepcopy(model), IMAGES)[0],
        "untie": surgery.untie(graph),
    }


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, state):
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[name], tensor) for name, tensor in state.items())


def test_there_is_an_edit_of_every_kind_here():
    assert set(edits_of(made())) == set(_KINDS)


@pytest.fixture(scope="module")
def edits():
    return edits_of(made())


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_it_is_plain_data_that_is_written_and_read(kind, edits):
    edit = edits[kind]
    assert dataclasses.is_dataclass(edit) and type(edit).__dataclass_params__.frozen  # type: ignore[attr-defined]
    written = json.dumps(edit.to_json(), allow_nan=False)
    again = surgery.edit_from_json(json.loads(written))
    assert again == edit and again.kind == kind and json.dumps(again.to_json()) == written
    with pytest.raises(FileFormatError):
        surgery.edit_from_json({"kind": kind, "rewrites": 3})


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_it_is_proved_replayed_and_taken_back_bit_for_bit(kind, edits):
    model, edit = made(), edits[kind]
    modules, state = list(model.modules()), state_of(model)
    with torch.no_grad():
        before = model(IMAGES)
    change = edit.apply(model)
    change.revert()
    assert list(model.modules()) == modules and same_state(model, state)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before)
    surgery.apply(model, edit, example=IMAGES, prove=True)
    assert surgery.structure_log(model).edits == [edit]
    torch.manual_seed(5)
    other = surgery.replay(Net().eval(), [surgery.edit_from_json(edit.to_json())])
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_optimiser_gradients_and_average_are_carried_along(kind, edits):
    model, edit = made(), edits[kind]
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    known = {id(parameter): parameter for parameter in model.parameters()}
    change = surgery.apply(model, edit)
    change.migrate_optimizer(optimizer)
    change.migrate(average)
    trained = {id(item) for group in optimizer.param_groups for item in group["params"]}
    assert trained == {id(item) for item in model.parameters()}
    assert set(optimizer.state) <= set(model.parameters()), "state of parameters that are gone"
    for parameter in model.parameters():
        if id(parameter) in known:
            assert parameter in optimizer.state and parameter.grad is not None
        if parameter in optimizer.state:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in average.state_dict().items()} == shapes
    optimizer.zero_grad()
    model(IMAGES).square().sum().backward()
    optimizer.step()


# A placing function that finds nothing to place may leave the network as it is.
@pytest.mark.parametrize("kind", sorted(set(_KINDS) - {"install"}))
def test_where_it_does_not_fit_it_says_so_in_one_line(kind, edits):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    modules, state = list(model.modules()), state_of(model)
    with pytest.raises(StructureError) as error:
        surgery.apply(model, edits[kind])
    assert "\n" not in str(error.value)
    assert list(model.modules()) == modules and same_state(model, state)
