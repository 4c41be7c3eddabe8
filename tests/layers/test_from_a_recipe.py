"""Layers that place themselves, from a recipe: logged as their own edits, once, and rebuilt from files."""

import pytest
import torch

from convette.models import create_model, load, save
from convette.surgery import Conversion, convert_by, structure_log

CONVERSIONS = {
    "lateral-inhibition": (Conversion("add_inhibition", options={"init": 0.1}), "append", 3),
    "maxdropout": (Conversion("insert_after_stages", options={"p": 0.2}), "append", 3),
    "atac": (Conversion("replace_activation"), "convert", 6),
    "soag": (Conversion("add_soag", options={"filters": 8}), "append", 3),
    "light-nonlocal": (Conversion("insert_nonlocal", options={"at": "block"}), "append", 9),
    "quadratic-convolution": (Conversion("to_quadratic", options={"rank": 2}), "convert", 1),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_converted_saved_and_loaded(name, tmp_path):
    conversion, kind, count = CONVERSIONS[name]
    model = create_model("resnet20", num_classes=3, seed=0)
    x = torch.randn(2, 3, 16, 16)
    convert_by(model, conversion, example=x)
    assert [edit.kind for edit in structure_log(model).edits] == [kind] * count
    save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))


# The layers themselves, by slug: in the place of another or behind a module.
BY_SLUG = {
    "lateral-inhibition": ("resnet20", {"after": ("layer?.*.bn2",), "options": {"init": 0.1}}, 9),
    "maxdropout": ("resnet20", {"after": ("every stage",), "options": {"p": 0.2}}, 2),
    "atac": ("timm:resnet18", {"replace": ("ReLU",), "where": ("first in block", "stage:4")}, 2),
    "soag": ("resnet20", {"after": ("stage:3",), "options": {"filters": 8}}, 1),
    "light-nonlocal": ("resnet20", {"after": ("layer3.?.bn2",), "options": {"ratio": 0.5}}, 3),
    "quadratic-convolution": ("resnet20", {"replace": ("Conv2d",), "where": ("stem",), "options": {"rank": 2}}, 1),
}


@pytest.mark.parametrize("slug", BY_SLUG)
def test_by_slug(slug):
    from convette.layers import find_layer

    name, arguments, count = BY_SLUG[slug]
    model = create_model(name, num_classes=3, seed=0)
    x = torch.randn(2, 3, 32, 32)
    convert_by(model, Conversion(slug, **arguments), example=x)
    assert sum(isinstance(module, find_layer(slug)) for module in model.modules()) == count
    model.train()(x).sum().backward()


def test_new_weights_follow_from_the_seed():
    first, again, other = (
        convert_by(model, Conversion("add_soag", seed=seed), example=torch.randn(1, 3, 16, 16)) and model
        for seed in (1, 1, 2)
        for model in [create_model("resnet20", seed=0)]
    )
    weights = [model.layer1[-1].left.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
