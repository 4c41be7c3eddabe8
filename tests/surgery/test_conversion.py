"""Conversions by name: systems found by slug, placed where they are said to go, all or nothing, replayed from a file."""

import copy

import pytest
import torch
from torch import nn

import convette
from convette import models, surgery
from convette.errors import ConvetteError, FileFormatError, StructureError, UsageError
from convette.layers import find_layer, is_layer, is_placing, public_layers
from convette.layers.normalization import BNET2d, SparseSwitchNorm2d, weight_align
from convette.surgery import Conversion, Install, convert_by, edit_from_json

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CASES = {
    "every norm": [Conversion("filtered-batch-norm", replace=("BatchNorm2d",))],
    "part of a stage": [
        Conversion("bnet", replace=("BatchNorm2d",), where=("stage:2", "last in block"), options={"k": 5})
    ],
    "behind stages": [Conversion("MixStyle", after=("stage:1", "stage:2"), options={"p": 0.25})],
    "weights and norms": [Conversion("weight-align"), Conversion("GroupNorm", replace=("BatchNorm2d",))],
    "head": [Conversion("final-batch-norm", replace=("Linear",), where=("head",))],
}


def fresh(name="resnet20"):
    return models.create_model(name, num_classes=4, in_channels=3, seed=0)


PAIRS = [(name, case) for name in ("resnet20", "mobilenet_v2") for case in CASES]
PAIRS += [("timm:efficientnet_b0", "every norm"), ("timm:efficientnet_b0", "behind stages")]
PAIRS += [("torchvision:resnet18", "part of a stage"), ("torchvision:resnet18", "weights and norms")]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_converted_network_runs_trains_and_is_the_same_from_its_file(name, case, tmp_path):
    model = fresh(name)
    change = convert_by(model, *CASES[case], example=IMAGES)
    assert change.edits and surgery.structure_log(model).edits == list(change.edits)
    model.train()(IMAGES.repeat(2, 1, 1, 1)).square().sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    models.save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(models.load(tmp_path / "m.safetensors")(IMAGES), model(IMAGES))


def test_names_are_slugs_classes_and_torch_layers():
    assert find_layer("sparse-switchable-normalization") is SparseSwitchNorm2d
    assert find_layer("BNET2d") is BNET2d and find_layer("GroupNorm") is nn.GroupNorm
    assert is_placing(find_layer("weight-align")) and not is_placing(nn.ReLU) and not is_layer(weight_align)
    with pytest.raises(UsageError, match="Did you mean 'weight-align'"):
        find_layer("wieght-align")
    with pytest.raises(UsageError, match="neither"):
        find_layer("os:system")


def test_every_public_name_of_the_rooms_is_found_by_itself():
    assert len(public_layers()) > 25
    for name, symbol in public_layers().items():
        assert find_layer(name) is symbol


def test_what_is_learned_goes_along_and_optimisers_train_what_is_new():
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    before = model.eval()(IMAGES)
    change = convert_by(model, Conversion("bnet", replace=("BatchNorm2d",)), example=IMAGES)
    change.migrate_optimizer(optimizer)
    torch.testing.assert_close(model(IMAGES), before, atol=1e-5, rtol=1e-5)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    raw = dict(model.named_parameters())["conv1.weight"]
    change = convert_by(model, Conversion("weight-align"))
    change.migrate_optimizer(optimizer)
    now = dict(model.named_parameters())
    assert now["conv1.parametrizations.weight.original"] is raw and raw in optimizer.state
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in now.values()}


@pytest.mark.parametrize(
    ("conversions", "words"),
    [
        ([Conversion("to_ibn")], "no residual blocks"),
        ([Conversion("weight-align"), Conversion("bnet", replace=("BatchNorm3d",))], "Did you mean 'BatchNorm2d'"),
        ([Conversion("weight-align"), Conversion("bnet", replace=("Conv2d",))], "does not run: running_mean"),
        ([Conversion("mixstyle", after=("layer9",))], "no such module"),
        ([Conversion("bnet", replace=("BatchNorm2d",), where=("stage:9",))], "stages"),
        ([Conversion("bnet", replace=("BatchNorm2d",), include=("nowhere*",))], "none of the"),
        (
            [Conversion("weight-align"), Conversion("Flatten", after=("features.3",))],
            "does not run",
        ),
    ],
)
def test_what_does_not_fit_leaves_the_network_alone(conversions, words):
    model = fresh("mobilenet_v2")
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ConvetteError, match=words):
        convert_by(model, *conversions, example=IMAGES)
    assert repr(model) == text and list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not surgery.structure_log(model).edits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"by": "bnet"}, "say what it replaces"),
        ({"by": "weight-align", "replace": ("BatchNorm2d",)}, "places itself.*WAConv2d"),
        ({"by": "bnet", "replace": ("BatchNorm2d",), "after": ("layer1",)}, "goes one way"),
        ({"by": "bnet", "replace": ("BatchNorm2d",), "options": {"kk": 3}}, "no option 'kk'"),
        ({"by": "bnet", "replace": ("BatchNorm2d",), "where": ("last in blok",)}, "Did you mean 'last in block'"),
        ({"by": "bnet", "replace": ("BatchNorm2d",), "where": ("stage:0",)}, "from 1"),
        ({"by": "weight-align", "where": ("stem",)}, "say what to replace"),
        ({"by": "norm-loss"}, "no layer"),
    ],
)
def test_what_can_be_said_of_no_network_is_refused_at_once(arguments, words):
    with pytest.raises(UsageError, match=words):
        Conversion(**arguments)


def test_a_placing_function_is_an_edit_that_is_undone_replayed_and_checked():
    edit = Install("convette.layers.normalization.consistent_normalization:to_consistent", {"stats": "clean"}, 3)
    model = fresh()
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    first = edit.apply(model)
    weights = copy.deepcopy(model.state_dict())
    first.revert()
    assert repr(model) == text and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    edit_from_json(edit.to_json()).apply(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for name in ("os:system", "torch.nn:ReLU", "convette.layers.normalization:norm_loss", "convette.surgery:fold", 3):
        with pytest.raises(FileFormatError):
            edit_from_json({**edit.to_json(), "function": name})
    with pytest.raises((StructureError, UsageError)):
        edit.apply(nn.Sequential(nn.Linear(2, 2)))


def test_convert_takes_slugs_and_names_and_several_kinds_at_once():
    model = fresh("torchvision:resnet18")
    convette.convert(model, {nn.BatchNorm2d: "bnet", nn.ReLU: "ATAC"}, IMAGES, include="layer1.*")
    assert {type(m).__name__ for m in model.layer1.modules()} >= {"BNET2d", "ATAC"}
    assert model.train()(IMAGES).shape == (2, 4)
    with pytest.raises(StructureError, match="places itself"):
        convette.convert(model, {nn.Conv2d: "weight-align"})
