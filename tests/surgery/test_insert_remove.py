"""Inserted layers change nothing at first and learn; removed blocks are bypassed, exactly."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.nets import OptionAResNet, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError


def resnet(seed=0):
    torch.manual_seed(seed)
    return randomise(OptionAResNet(blocks=2, width=4))


def plain(seed=0, act=nn.ReLU):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        act(),
        nn.Conv2d(6, 4, 3, 2),
        nn.BatchNorm2d(4),
        act(),
        nn.Flatten(),
    ]
    return randomise(nn.Sequential(*layers, nn.Linear(100, 3)))


IMAGES = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(0))


def output(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def near(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@settings(max_examples=30, deadline=None)
@given(
    module=st.sampled_from(["conv1", "bn1", "layer1", "layer2.0", "layer2.1.conv1", "layer2.1.bn1", "layer3.1.bn2"]),
    form=st.sampled_from(["conv", "block"]),
    kernel=st.sampled_from([1, 3, 5]),
    norm=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_inserting_anywhere_changes_nothing_and_replays(module, form, kernel, norm, groups, seed):
    model = resnet(seed)
    expected = output(model)
    edit = surgery.insert(model, module, IMAGES, form, kernel_size=kernel, norm=norm, groups=groups, seed=seed)
    assert torch.equal(output(model), expected)
    assert surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    surgery.apply(model, edit, example=IMAGES, prove=True)
    assert near(output(model), expected)
    fresh = surgery.replay(resnet(seed), [edit])
    assert torch.equal(output(fresh), output(model))


def test_activations_are_found():
    for act, name in ((nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, None)):
        behind = surgery.insert(plain(act=act), "2", IMAGES)
        before = surgery.insert(plain(act=act), "1", IMAGES)
        assert (behind.activation, behind.activation_first) == (name, False)
        # In front of a ReLU6 a ReLU is as good.
        assert before.activation == ("relu" if name else None) and before.activation_first == (name is not None)
    # Training from the example's own batch, the norm starts as the identity too.
    model = plain()
    edit = surgery.insert(model, "2", IMAGES)
    surgery.apply(model, edit)
    given_ = model[:2](IMAGES).relu()
    model[2].train()
    assert near(model[2](given_), given_, 1e-4)


def test_new_layers_learn_with_the_optimiser_and_can_be_cut_and_saved(tmp_path):
    model = surgery.set_origin(resnet(), surgery.Origin("test"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = copy.deepcopy(model)
    edits = [surgery.insert(model, "layer2.0.bn1", IMAGES), surgery.insert(model, "layer3", IMAGES, "block")]
    change = surgery.apply(model, *edits, example=IMAGES, prove=True)
    change.migrate_optimizer(optimizer)
    change.migrate(average)
    assert torch.equal(output(average), output(model))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    same = [name for name, p in model.named_parameters() if "layer3.1." in name and not p.grad.abs().sum() > 0]
    assert not same
    model.eval()
    graph = surgery.trace(model, IMAGES)
    surgery.apply(
        model, graph.shrink({g.name: torch.arange(g.size - 1) for g in graph.groups}), example=IMAGES, prove=True
    )
    surgery.save_model(model, tmp_path / "m.safetensors")
    again = surgery.load_model(tmp_path / "m.safetensors", lambda origin: resnet(7))
    assert torch.equal(output(again), output(model))


def test_removed_block_is_bypassed():
    model = resnet()
    assert surgery.removable(model, IMAGES) == ("layer1.0", "layer1.1", "layer2.1", "layer3.1")
    bypass = copy.deepcopy(model)
    bypass.layer2[1].register_forward_hook(lambda module, args, output: args[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edit = surgery.remove(model, "layer2.1", IMAGES)
    assert surgery.edit_from_json(edit.to_json()) == edit
    change = surgery.apply(model, edit, example=IMAGES, prove=True)
    assert torch.equal(output(model), output(bypass))
    change.migrate_optimizer(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    # A block put in and taken out again: nothing has happened.
    model = resnet()
    before = output(model)
    surgery.apply(model, surgery.insert(model, "layer1", IMAGES, "block"))
    surgery.apply(model, surgery.remove(model, "layer1.1", IMAGES))
    assert torch.equal(output(model), before)


def test_what_cannot_be_left_out_is_refused():
    model = resnet()
    modules = list(model.modules())
    for name, reason in (("layer2.0", "gives"), ("linear", "gives"), ("nothing", "no module"), ("conv1", "gives")):
        with pytest.raises(StructureError, match=reason):
            surgery.remove(model, name, IMAGES)
    with pytest.raises(StructureError, match="itself"):
        surgery.apply(nn.Sequential(nn.Conv2d(3, 3, 1)), surgery.Remove(""))
    with pytest.raises(StructureError, match="behind"):
        surgery.insert(model, "linear", IMAGES)
    with pytest.raises(StructureError, match="odd"):
        surgery.insert(model, "bn1", IMAGES, kernel_size=2)
    with pytest.raises(StructureError, match="channels"):
        surgery.apply(model, surgery.Insert("bn1", 5))
    assert list(model.modules()) == modules


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 1 << 40},
        {"channels": 0},
        {"channels": 4.0},
        {"form": "tower"},
        {"kernel_size": 4},
        {"kernel_size": 999},
        {"groups": 3},
        {"activation": "os.system"},
        {"activation": ["relu"]},
        {"mean": [0.0]},
        {"var": [1.0, 1.0, 1.0, -1.0]},
        {"mean": [0.0, 0.0, 0.0, float("nan")]},
        {"mean": "abcd"},
        {"norm": 1},
        {"seed": -1},
        {"surprise": 1},
        {"module": ""},
        {"module": 3},
    ],
)
def test_tampered_inserts_are_refused(change):
    value = {**surgery.Insert("bn1", 4).to_json(), **change}
    with pytest.raises(FileFormatError, match="insert") as caught:
        surgery.edit_from_json(value)
    assert "\n" not in str(caught.value)


def test_tampered_removes_are_refused():
    for value in ({"kind": "remove"}, {"kind": "remove", "module": 3}, {"kind": "remove", "module": ""}):
        with pytest.raises(FileFormatError, match="remove"):
            surgery.edit_from_json(value)
