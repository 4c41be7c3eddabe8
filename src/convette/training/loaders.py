"""Which images each process sees when, and the look at the validation split."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import DataError, UsageError
from convette.layers._watching import in_eval
from convette.training._fabric import FabricAdapter
from convette.training.distributed import sum_over_ranks
from convette.training.evaluation import score
from convette.training.settings import TrainSettings
from convette.training.transform import BatchTransform

_VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Shares:
    """How an epoch is cut: `batch` images a pass on each of `world` ranks, `steps` optimiser steps an epoch."""

    batch: int
    steps: int
    images_per_step: int


def cut_epoch(images: int, settings: TrainSettings, world: int) -> Shares:
    """Return the `Shares` of an epoch over `images` images.

    Only whole steps are made; the few images left over are others in the next epoch. A set smaller than one step is
    one step. Raises `UsageError` where `batch_size` cannot be divided among the ranks, `DataError` for too few images.
    """
    if settings.batch_size % world:
        near = max(world, round(settings.batch_size / world) * world)
        raise UsageError(
            f"train.batch_size = {settings.batch_size} cannot be divided among {world} processes; use {near}."
        )
    batch = min(settings.batch_size, images // settings.accumulate // world * world)
    if batch < world:
        raise DataError(f"{images} training images are too few for {world} processes x {settings.accumulate} passes.")
    per_step = batch * settings.accumulate
    return Shares(batch // world, images // per_step, per_step)


def training_batches(
    split: Any, shares: Shares, settings: TrainSettings, rank: int, world: int
) -> Callable[[int, int], Iterator[Any]]:
    """Return ``batches(epoch, skip)``: this rank's shuffled batches of an epoch, without the first `skip`."""
    total = shares.steps * settings.accumulate

    def batches(epoch: int, skip: int) -> Iterator[Any]:
        found = split.batches(
            shares.batch,
            shuffle=True,
            seed=settings.seed,
            epoch=epoch,
            drop_last=True,
            rank=rank,
            world_size=world,
            skip=skip,
        )
        return itertools.islice(found, total - skip)

    return batches


def validator(
    split: Any, transform: BatchTransform, fabric: FabricAdapter
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Return the function that looks at the validation split, each rank at its part; None if it is empty."""
    if len(split) == 0:
        return None

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        # Splits pad the ranks to equal length by showing images twice; here each may count once only.
        left = len(range(fabric.rank, len(split), fabric.world_size))
        for batch in split.batches(_VALIDATION_BATCH, rank=fabric.rank, world_size=fabric.world_size):
            images, labels = transform(batch)
            yield images[:left], labels[:left]
            left -= min(left, len(labels))

    def validate(model: nn.Module) -> Mapping[str, float]:
        with in_eval(model), torch.no_grad(), fabric.autocast():
            sums = score(model, pairs(), fabric.device)
        loss, right, count = sum_over_ranks(sums).tolist()
        return {"loss": loss / count, "accuracy": right / count}

    return validate
