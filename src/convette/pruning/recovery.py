"""Repairing the network after a cut: batch-norm statistics, and training taught by the network before."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convette.data import ImageData
from convette.pruning.settings import PruneSettings
from convette.training import Distillation, TrainSettings, recalibrate_batch_norm, train

# Gentler than training from scratch: the weights that are left are good ones.
RECOVERY = TrainSettings(learning_rate=0.02, warmup_epochs=0.2, label_smoothing=0.0)


def recalibrate(network: nn.Module, data: ImageData, *, batches: int = 20, seed: int = 0) -> None:
    """Take the batch-norm statistics of `network` anew on training images, in place; nothing without batch norm."""
    recalibrate_batch_norm(network, data.train, data.preprocessing, batches=batches, seed=seed)


def recover(
    network: nn.Module,
    parent: nn.Module,
    data: ImageData,
    epochs: int,
    settings: PruneSettings,
    *,
    train_settings: TrainSettings | None = None,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    title: str = "recover",
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Train `network` for `epochs` on the training split of `data`, taught by `parent` if ``settings.distil``.

    `train_settings` (default `RECOVERY`) gives everything but the number of epochs. Returns the trained network and
    its epoch records. Resumes from `checkpoint_dir`.
    """
    chosen = replace(train_settings or RECOVERY, epochs=epochs)
    methods = (Distillation(copy.deepcopy(parent).eval()),) if settings.distil else ()
    result = train(network, data, chosen, methods=methods, device=device, checkpoint_dir=checkpoint_dir, title=title)
    return result.model, tuple(result.history)
