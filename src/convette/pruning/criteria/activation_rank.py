"""Rank of feature maps: how much a unit says that is not one pattern repeated."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convette.pruning.criteria.apoz import mean_over_readers
from convette.surgery import ChannelGraph


def activation_rank(
    model: nn.Module, graph: ChannelGraph, calibration: Iterable[Any] | None = None, *, relative: bool = True
) -> dict[str, Tensor]:
    r"""Score units by the mean rank of their feature maps (HRank).

    .. math:: s_u = \frac{1}{N R} \sum_{n,r} \operatorname{rank}(X_{n,r,u}) \,/\, \min(H, W)

    X the H x W map of unit u as its readers r read it. `relative` (default) divides by the largest rank a map of that
    size can have, so that layers of different sizes compare. A unit without a map (a linear layer) has rank 1 where it
    is not zero.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for activations that are not finite. Costs a forward pass a batch and a singular value decomposition a map. Source:
    Lin et al., HRank: Filter Pruning using High-Rank Feature Map, arXiv 2002.10179.
    """

    def figure(values: Tensor) -> Tensor:
        if values.ndim != 5:
            return (values.flatten(2) != 0).float().mean(dim=2)
        if not torch.isfinite(values).all():
            return torch.full(values.shape[:2], torch.nan)
        largest = min(values.shape[-2:]) if relative else 1
        return torch.linalg.matrix_rank(values).float().mean(dim=2) / largest

    return mean_over_readers(model, graph, calibration, "activation_rank", figure)
