"""Pruning without data: an example of the input is enough to count costs and to see which channels go together."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from convette import models
from convette._progress import note
from convette.cost import Budget
from convette.errors import StructureError, UsageError
from convette.pipeline._latency import measure_from_start
from convette.pipeline.inspect import input_of, open_model
from convette.pipeline.recipe import Recipe
from convette.pipeline.single import PruneOutcome
from convette.pruning import prune
from convette.surgery import ModelCard, card_of, first_that_runs, set_card

# Tried one after the other where the input a network states is not known: (frames and) rows and columns.
_SIDES = (224, 256, 299, 320, 384, 96, 32)
_CLIPS = ((16, 112), (8, 64), (16, 224), (32, 224))


def example_of(model: nn.Module) -> Tensor:
    """Return noise of the shape of the network's input: what its card or its library says, else what it runs on.

    Raises `UsageError` with what the network says to the stated size where it runs on no size that was tried.
    """
    stated = input_of(model)
    shapes = [(stated.channels, stated.height, stated.width)]
    shapes += [(stated.channels, side, side) for side in _SIDES]
    shapes += [(stated.channels, frames, side, side) for frames, side in _CLIPS]
    try:
        return first_that_runs(model, shapes)
    except StructureError as error:
        raise UsageError(f"{error} ({stated.height} pixels, then other sizes)") from error


def prune_from_example(recipe: Recipe, out: Path | str) -> PruneOutcome:
    """Prune the network of `recipe` to its budget with an example only: no recovery, no accuracies; write it to `out`.

    In one step, as nothing is learned between two. Raises `UsageError` for a criterion that needs data.
    """
    out, section = Path(out), recipe.model
    network = open_model(section.name, weights=section.weights, pretrained=section.pretrained, seed=recipe.run.seed)
    note("prune: without --data there is no recovery and no accuracy; the network is cut to the budget only")
    example = example_of(network)
    settings = replace(recipe.prune, steps=1, recalibrate=False, distil=False)
    card = card_of(network)
    if not card.preprocessing and example.ndim == 4:
        stated = replace(input_of(network), height=example.shape[2], width=example.shape[3])
        set_card(network, ModelCard(card.task, card.class_names, stated.to_json(), card.history))
    budget = Budget.parse(recipe.budget.limits)
    result = prune(network, example, budget, settings, measure=measure_from_start, device="cpu")
    models.save(result.model, out)
    return PruneOutcome.of(result, out, budget)
