"""Repairing the network after a cut: batch-norm statistics, and training taught by the network before."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette.data import ImageData
from convette.layers._watching import hooked, in_eval
from convette.pruning.in_place_distillation import InPlaceDistillation
from convette.pruning.settings import PruneSettings
from convette.training import Distillation, Method, TrainSettings, recalibrate_batch_norm, train

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
    methods: Sequence[Method] = (),
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    title: str = "recover",
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Train `network` for `epochs` on the training split of `data`, taught by `parent` if ``settings.distil``.

    `train_settings` (default `RECOVERY`) gives everything but the number of epochs; `methods` take part beside the
    teacher (`teaching`). Returns the trained network and its epoch records. Resumes from `checkpoint_dir`.
    """
    chosen = replace(train_settings or RECOVERY, epochs=epochs)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    result = train(
        network,
        data,
        chosen,
        methods=(*teaching(network, parent, example, settings), *methods),
        device=device,
        checkpoint_dir=checkpoint_dir,
        title=title,
    )
    return result.model, tuple(result.history)


def teaching(network: nn.Module, parent: nn.Module, example: Tensor, settings: PruneSettings) -> tuple[Method, ...]:
    """Return the methods by which `parent` teaches `network`, as ``settings.distil`` and ``distil_from`` say."""
    if not settings.distil:
        return ()
    teacher = copy.deepcopy(parent).eval()
    if settings.distil_from == "in_place":
        return (InPlaceDistillation(teacher),)
    if settings.distil_from == "features":
        shared = stage_outputs(parent, example).values()
        still = set(dict(network.named_modules()))
        return (Distillation(teacher, features={name: name for name in shared if name in still}),)
    return (Distillation(teacher),)


@torch.no_grad()
def stage_outputs(network: nn.Module, example: Tensor) -> dict[tuple[int, int], str]:
    """Return for each size of feature map (height, width) the last, outermost module that puts one out.

    Where a network has stages these are the ends of its stages: what a student can be compared with, whatever its
    widths. Costs one forward run on `example`.
    """
    names = {id(module): name for name, module in network.named_modules()}
    found: dict[tuple[int, int], str] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        name = names[id(module)]
        if name and isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found[int(output.shape[2]), int(output.shape[3])] = name

    handles = [module.register_forward_hook(note) for module in network.modules()]
    device = next(network.parameters()).device
    with hooked(handles), in_eval(network):
        network(example.to(device))
    return found
