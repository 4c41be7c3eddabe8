"""Geometric median: filters near the middle of the others can be replaced by them."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, tensors_of
from convette.pruning.criteria._observing import producer_rows
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def geometric_median(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the distance of their filters to all the others (FPGM).

    .. math:: s_u = \sum_{v} \lVert w_u - w_v \rVert_2

    with w_u all producer slices of unit u as one vector, v over the units of the group. Small: close to the geometric
    median, so that others carry the same. A unit of zero weights is not special here. `normalise` divides by the
    group's mean (default), its maximum, or nothing. Groups without producer weights get no score.

    Returns one score a unit, CPU float32, larger = keep. Raises `StructureError` for a weight that is not finite. Costs
    units squared times weights a unit; needs no data (`calibration` is ignored). Source: He et al., Filter Pruning via
    Geometric Median, arXiv 1811.00250.
    """
    check_values("criterion geometric_median", geometric_median, normalise=normalise)
    tensors = tensors_of(model)
    scores = {}
    for group in graph.groups:
        rows = producer_rows(group, tensors) if group.size else None
        if rows is not None:
            scores[group.name] = normalised(_distances(rows.double()).sum(dim=1), normalise)
    return finite_scores(scores, "geometric_median", graph)


def _distances(rows: Tensor) -> Tensor:
    """Return all distances between rows, from their products: in float64, duplicates come out at 0 all the same."""
    products = rows @ rows.T
    squares = products.diagonal()
    return (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products).clamp_min(0).sqrt()
