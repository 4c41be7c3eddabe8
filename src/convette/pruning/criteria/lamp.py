"""Layer-adaptive magnitude: the share of a unit in what would still be there when its turn comes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convette.pruning._units import finite_scores, sum_over_units, tensors_of, weight_members
from convette.surgery import ChannelGraph


def lamp(model: nn.Module, graph: ChannelGraph, calibration: Iterable[Any] | None = None) -> dict[str, Tensor]:
    r"""Score units by layer-adaptive magnitude (LAMP), taken over whole units instead of single weights.

    .. math:: s_u = \frac{q_u}{\sum_{v:\, q_v \ge q_u} q_v}, \qquad q_u = \sum_m \lVert w_{m,u} \rVert_2^2

    with :math:`w_{m,u}` the slices of the producer weights of unit u. The sum runs over the units that are still there
    when u is the next to go (equal ones: the later unit counts as the larger), so the score is the relative distortion
    of the group's weights that removing u causes. The largest unit of every group scores 1: a global ranking never
    empties a group, and small groups are spared without any ratio set by hand.

    Returns one score in 0..1 a unit for every group with producers, CPU float32, larger = keep.
    Raises `StructureError` for a weight that is NaN or infinite. Costs one pass over the weights; needs no data
    (`calibration` is ignored). Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv
    2010.07611.
    """
    tensors = tensors_of(model)
    scores = {}
    for group in graph.groups:
        members = weight_members(group, "producer", tensors)
        if members and group.size:
            squares = [sum_over_units(tensors[m.parameter].detach().double() ** 2, m).cpu() for m in members]
            scores[group.name] = lamp_scores(torch.stack(squares).sum(dim=0))
    return finite_scores(scores, "lamp", graph)


def lamp_scores(squares: Tensor) -> Tensor:
    """Return the LAMP scores of the squared magnitudes of one group; all zeros give zeros."""
    ascending, order = squares.sort(stable=True)
    still_there = ascending.flip(0).cumsum(0).flip(0)
    shares = torch.where(still_there > 0, ascending / still_there, torch.where(still_there == 0, 0.0, torch.nan))
    return torch.empty_like(shares).scatter_(0, order, shares)
