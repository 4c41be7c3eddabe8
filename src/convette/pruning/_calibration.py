"""Calibration images, and the loss of a cut network on them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.data import ImageData
from convette.surgery import ChannelGraph, apply

CALIBRATION_BATCH = 64
Batches = Sequence[tuple[Tensor, Tensor]]


def draw_calibration(data: ImageData, count: int, *, seed: int, device: torch.device | str) -> list[tuple[Any, Any]]:
    """Return `count` training images with their labels, ready for the network, in batches on `device`."""
    left, found = count, []
    for batch in data.train.batches(min(CALIBRATION_BATCH, left), shuffle=True, seed=seed):
        images, labels = batch.images[:left].to(device), batch.labels[:left].to(device)
        found.append((data.preprocessing(images), labels))
        left -= len(labels)
        if left <= 0:
            break
    return found


def cut(network: nn.Module, graph: ChannelGraph, selection: Mapping[str, Tensor]) -> nn.Module:
    """Shrink `network` to `selection` in place and return it; `graph` is of this network or one of the same shape."""
    if selection:
        apply(network, graph.shrink(selection))
    return network


@dataclass(frozen=True)
class CutLoss:
    """The mean cross-entropy on `batches` of a copy of `network` cut to a selection.

    With `recalibrate` batch norms take their statistics anew on these images first. What searches by gradient finds
    network and images here.
    """

    network: nn.Module
    graph: ChannelGraph
    batches: Batches
    recalibrate: bool = True

    @torch.no_grad()
    def __call__(self, selection: Mapping[str, Tensor]) -> float:
        """Return the loss of `selection`."""
        own = cut(copy.deepcopy(self.network), self.graph, selection).eval()
        if self.recalibrate and selection:
            take_statistics(own, [images for images, _ in self.batches])
        total = sum(float(functional.cross_entropy(own(x), y, reduction="sum")) for x, y in self.batches)
        return total / sum(len(y) for _, y in self.batches)


def loss_of_cuts(network: nn.Module, graph: ChannelGraph, batches: Batches, *, recalibrate: bool = True) -> CutLoss:
    """Return ``loss(selection)``: the loss of what a cut leaves, on `batches` (`CutLoss`)."""
    return CutLoss(network, graph, batches, recalibrate)


@torch.no_grad()
def take_statistics(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Take batch-norm statistics anew as plain means over `batches`; nothing where no batch has two images."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    batches = [images for images in batches if len(images) > 1]
    if not norms or not batches:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for images in batches:
        network(images)
    network.eval()
