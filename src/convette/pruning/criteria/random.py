"""Chance, the control every other criterion has to beat."""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convette.surgery import ChannelGraph


def random(
    model: nn.Module, graph: ChannelGraph, calibration: Iterable[Any] | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    r"""Score units by uniform random numbers, :math:`s_u \sim U(0, 1)`.

    The numbers of a group depend on `seed`, its name and its size alone: not on the weights, the other groups or the
    global random state. Returns one score a unit for every group, CPU float32. Needs no data (`calibration` is
    ignored).
    """
    scores = {}
    for group in graph.groups:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{group.name}".encode()))
        scores[group.name] = torch.rand(group.size, generator=generator)
    return scores
