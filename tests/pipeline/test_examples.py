"""The recipes in examples/: they load, and what they convert to can be built, trained and saved."""

from pathlib import Path

import pytest
import torch

import convette
from convette import models
from convette.pipeline import load_recipe
from convette.pipeline.conversion import convert_network
from convette.surgery import fold, what_stays

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_its_conversions_apply(path, tmp_path):
    recipe = load_recipe(path)
    assert f"--recipe examples/{path.name}" in path.read_text()
    if not recipe.convert.steps:
        return
    model = models.create_model(recipe.model.name, num_classes=10, in_channels=1, stem="small", seed=0)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert len(convert_network(recipe, model, images)) == len(recipe.convert.steps)
    model.train()(images).sum().backward()
    models.save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(convette.load(tmp_path / "m.safetensors")(images), model(images))
    folded = fold(model, images)
    torch.testing.assert_close(folded(images), model(images), atol=1e-4, rtol=1e-4)
    assert all(len(reason) > 20 for reason in what_stays(folded).values())
