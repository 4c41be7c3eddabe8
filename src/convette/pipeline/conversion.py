"""What a recipe's `[[convert]]` and `[[method]]` come to: a converted network, and the methods it is trained with."""

from torch import Tensor, nn

from convette import surgery
from convette._progress import note
from convette.data import ImageData
from convette.errors import ConvetteError
from convette.layers import find_layer
from convette.pipeline.recipe import Recipe
from convette.pipeline.searched import methods_of_search
from convette.training import Method, find_method, make_method, with_own


def convert_network(recipe: Recipe, model: nn.Module, example: Tensor) -> list[str]:
    """Carry the conversions of `recipe` out on `model`, in order; return what was done, in words.

    Raises the error of the step that does not fit, with its number and words in front; the network is then converted
    as far as the steps before it.
    """
    done = []
    for number, step in enumerate(recipe.convert.steps, start=1):
        try:
            change = surgery.convert_by(model, step.conversion(recipe.run.seed), example=example)
        except ConvetteError as error:
            raise type(error)(f"convert, step {number} ({step.words()}): {error}") from error
        places = sum(edit.kind != surgery.Install.kind for edit in change.edits)
        done.append(f"{step.words()}: {places} layer{'s' * (places > 1)}" if places else step.words())
        note(f"convert: {done[-1]}")
    return done


def training_methods(recipe: Recipe, model: nn.Module, data: ImageData) -> list[Method]:
    """Return the methods to train `model` with: those of the recipe, and those its layers bring along."""
    chosen = [make_method(find_method(step.name), step.options, data) for step in recipe.method.steps]
    chosen += methods_of_search(recipe.model.name, recipe.model.options, chosen)
    off = {find_layer(step.by).__module__ for step in recipe.convert.steps if step.method == "off"}
    methods = with_own(model, chosen, data, leave=lambda kind: kind.__module__ in off)
    for method in methods:
        note(f"train: with {type(method).__name__}")
    return methods


def deployed(model: nn.Module, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """Return the network as it is deployed, everything folded that can be, and why what is left stays."""
    folded = surgery.fold(model, example)
    return folded, surgery.what_stays(folded)
