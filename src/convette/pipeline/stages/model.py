"""Stage model: the network to start from, and whether the budget can be reached from it at all."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from convette import models, surgery
from convette._progress import note
from convette.cost import Cost, count, format_count
from convette.data import ImageData
from convette.errors import BudgetError
from convette.pipeline._latency import measurer
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.conversion import convert_network
from convette.pipeline.few_bits import float_budget
from convette.pipeline.inspect import check_network
from convette.pipeline.recipe import ModelSection
from convette.pipeline.results import ModelResult
from convette.pipeline.searched import DASS, searched_network

SMALL_IMAGE = 64


def choose_model(run: Run, folder: Path) -> ModelResult:
    """Build the network, put task and preprocessing on its card, and refuse a budget out of reach before training."""
    section, data = run.recipe.model, run.raw_data
    name, reason = choose_name(section, data)
    if name == DASS:
        model = searched_network(name, section.options, data, run.recipe.run.seed)
        reason = "searched for sparse weights"
    else:
        model = models.create_model(
            name,
            num_classes=data.num_classes,
            in_channels=data.preprocessing.channels,
            pretrained=section.pretrained,
            stem=choose_stem(section, data),
            weights=section.weights,
            seed=run.recipe.run.seed,
        )
    data = put_card(model, data, keep_normalisation=run.recipe.data.mean is not None)
    example = data.preprocessing(data.train.images([0]))
    check_network(model, name, example)
    converted = convert_network(run.recipe, model, example)
    cost = count(model, example)
    note(f"model: {name} ({reason}), {format_count(cost.parameters)} parameters, {format_count(cost.macs)} MACs")
    smallest = _check_budget(run, model, data)
    models.save(model, folder / MODEL_FILE)
    return ModelResult(
        name=name,
        requested=section.name,
        reason=reason,
        cost=cost.to_json(),
        smallest=smallest.to_json() if smallest else None,
        converted=converted,
    )


def choose_name(section: ModelSection, data: ImageData) -> tuple[str, str]:
    """Return the name of the network to build, and why this one."""
    if section.name != "auto":
        return section.name, "as asked"
    side = max(data.preprocessing.height, data.preprocessing.width)
    if side <= SMALL_IMAGE:
        return "resnet20", f"images of {side} pixels are small"
    return "timm:resnet18", f"images of {side} pixels are large"


def choose_stem(section: ModelSection, data: ImageData) -> Literal["default", "small"]:
    """Return the stem for these images: small ones must not lose resolution in it."""
    if section.stem != "auto":
        return section.stem
    if section.pretrained or section.weights or Path(section.name).suffix == ".safetensors":
        return "default"
    return "small" if max(data.preprocessing.height, data.preprocessing.width) <= SMALL_IMAGE else "default"


def put_card(model: nn.Module, data: ImageData, *, keep_normalisation: bool) -> ImageData:
    """Write class names and preprocessing on the model's card; returns the data, normalised as the weights expect."""
    known = models.known_preprocessing(model)
    if known is not None and not keep_normalisation:
        data = data.with_preprocessing(mean=known[0], std=known[1])
    card = surgery.card_of(model)
    surgery.set_card(
        model, replace(card, class_names=tuple(data.class_names), preprocessing=data.preprocessing.to_json())
    )
    return data


def _check_budget(run: Run, model: nn.Module, data: ImageData) -> Cost | None:
    from convette.pruning import check_budget

    budget = run.budget
    if budget is None:
        return None
    if run.bits_tried:
        example = data.preprocessing(data.train.images([0]))
        budget = float_budget(budget, min(run.bits_tried), count(model, example))
    measure = measurer(budget, run.recipe.run.contention)
    try:
        return check_budget(model, data, budget, run.recipe.prune, measure=measure)
    except BudgetError as error:
        if not run.bits_tried:
            raise
        raise BudgetError(
            f"{run.budget}: out of reach with {min(run.bits_tried)} bits a weight. In float32, before rounding: "
            f"{error} quantize.tried and quantize.bits name the bits."
        ) from error


STAGE = Stage("model", choose_model)
