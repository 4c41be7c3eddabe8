"""A limit on size, met by cuts and bits together: what is left of a network, and in how many bits, is tried out.

With b bits a weight the limit holds 32 / b times as many weights as in float32. For each of a few b the trained network
is pruned to what b bits leave room for and rounded; the one that is best on the validation split goes on, and the stage
quantize then gives each of its layers the bits that fill the limit.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convette._progress import note
from convette.cost import Budget, Cost, format_bytes
from convette.data import ImageData
from convette.errors import BudgetError
from convette.pipeline._run import Run
from convette.pipeline.results import BitsTried
from convette.pruning import PruneResult
from convette.quantization import LowBitResult, QuantizeSettings, low_bit
from convette.quantization._calibration import training_images
from convette.quantization.low_bit_limited_data import settings_from
from convette.training import distributed, evaluate

HEADER = 5_000  # bytes of a file that are no weights: names, what was cut and when
SCALES = 1.05  # with scales and biases; batch norms, which the float network has besides, are folded
JUDGED = 4  # networks are compared after this part of the distillation


def limit_of(budget: Budget | None, start: Cost) -> int | None:
    """Return the bytes `budget` allows a network that began as `start`; None where it does not say."""
    limits = [limit for limit in budget.limits if limit.metric == "size"] if budget else []
    return min((int(x.value * start.size if x.relative else x.value) for x in limits), default=None)


def float_budget(budget: Budget, bits: int, start: Cost) -> Budget:
    """Return `budget` for the float network that `bits` bits will be made of: its size is what they leave room for."""
    room = limit_of(budget, start)
    if room is None:
        return budget
    room = max(room - HEADER, room / 2) * 32 / bits / SCALES
    limits = [replace(x, value=room, relative=False) if x.metric == "size" else x for x in budget.limits]
    return Budget(tuple(limits))


def within_limit(
    network: nn.Module, images: Tensor, recipe: QuantizeSettings, budget: Budget | None, start: Cost, part: int = 1
) -> LowBitResult:
    """Return `network` in few bits within `budget`'s limit on size, if it has one, after a `part`-th of the
    distillation; `start`: the network that a relative limit is relative to."""
    settings = settings_from(recipe, limit_of(budget, start))
    return low_bit(
        network,
        images,
        replace(settings, block_steps=settings.block_steps // part, joint_steps=settings.joint_steps // part),
    )


def rounded(run: Run, network: nn.Module, images: Tensor, start: Cost, part: int = 1) -> LowBitResult:
    """Return `network` in few bits within the limit of the run; see `within_limit`."""
    return within_limit(network, images, run.recipe.quantize, run.budget, start, part)


def prune_for_bits(
    run: Run, start: Cost, prune_to: Callable[[Budget, Path], PruneResult]
) -> tuple[PruneResult, list[BitsTried]]:
    """Prune for each number of bits the recipe names, and return the best with what all came to.

    `prune_to` prunes to a budget and keeps its state in a folder. Raises the `BudgetError` of the fewest bits where
    none can be reached.
    """
    assert run.budget is not None
    results: dict[int, PruneResult] = {}
    tried: list[BitsTried] = []
    failure = None
    for bits in sorted(run.bits_tried, reverse=True):
        folder = run.folder.checkpoints("compress") / f"{bits}-bits"
        try:
            note(f"compress: for {bits} bits a weight")
            result = prune_to(float_budget(run.budget, bits, start), folder)
            if distributed.is_main():
                tried.append(_judged(run, bits, result, start))
        except BudgetError as error:
            note(f"compress: {bits} bits a weight are left out: {error}")
            failure = error
            continue
        results[bits] = result
    best = distributed.broadcast(max(tried, key=lambda one: (one.accuracy, -one.loss)).bits if tried else 0)
    if not best:
        assert failure is not None
        raise failure
    return results[best], [one.model_copy(update={"kept": one.bits == best}) for one in tried]


def _judged(run: Run, bits: int, result: PruneResult, start: Cost) -> BitsTried:
    found = rounded(run, result.model, images_of(run), start, JUDGED)
    scores = evaluate(found.model, run.data.validation, run.data.preprocessing)
    size = found.file_size or found.size
    note(
        f"compress: {bits} bits a weight: {result.end.parameters:,} parameters, {format_bytes(size)}, "
        f"{scores.accuracy:.2%} right on the validation split"
    )
    return BitsTried(
        bits=bits,
        parameters=result.end.parameters,
        bytes=size,
        accuracy=scores.accuracy,
        loss=scores.loss,
    )


def images_of(run: Run) -> Tensor:
    """Return the training images, without labels, that the network in few bits of a run learns from."""
    return calibration_images(run.data, run.recipe.quantize)


def calibration_images(data: ImageData, settings: QuantizeSettings) -> Tensor:
    """Return the training images, without labels, that ranges are taken on and few bits learn from, preprocessed."""
    return torch.cat(training_images(data, data.preprocessing, settings.calibration_images, settings.seed))


def tried_text(tried: list[BitsTried]) -> str:
    """Return what was tried in a sentence; empty where nothing was."""
    if len(tried) < 2:
        return ""
    parts = [
        f"{one.bits} bits and {one.parameters:,} parameters {one.accuracy:.2%}{' (kept)' if one.kept else ''}"
        for one in tried
    ]
    return f" Pruned for {', '.join(parts)} on the validation split."
