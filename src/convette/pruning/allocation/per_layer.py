"""From every group as much as costs the same loss, measured."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from convette.cost import Limit, WidthCost
from convette.errors import StructureError, UsageError
from convette.pruning._options import check_values
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation._search import cheapest_first
from convette.surgery import ChannelGraph

RATIOS = (0.25, 0.5, 0.75)
Ratios = Annotated[Sequence[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]


def per_layer(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[[Mapping[str, Tensor]], float] | None = None,
    ratios: Ratios = RATIOS,
) -> dict[str, Tensor]:
    r"""Remove from every group the share that raises the loss by the same amount, the group cut alone.

    .. math:: r_g = \max\{r : \Delta_g(r) \le \tau\}, \qquad \tau = \min\{\tau : cost(K) \le limit\}

    where :math:`\Delta_g(r)` is how much ``loss(selection)`` rises when the share r of group g with the lowest scores
    goes: measured at `ratios`, made non-decreasing, linear in between and beyond. ``loss`` gives the loss on
    calibration data of the network with only the selected units. The scores only compare within a group.

    Returns the kept units of every group that loses some. Raises `BudgetError` with the smallest reachable cost,
    `UsageError` without `loss`, `StructureError` if the whole network's loss is not finite. Costs groups x ratios + 1
    evaluations of `loss`, beside the cost predictions. Source: the sensitivity scan of Li et al., arXiv 1608.08710.
    """
    if loss is None:
        raise UsageError("allocation per_layer measures the loss: give a data set, or use global or uniform.")
    check_values("allocation per_layer", per_layer, ratios=ratios)
    ladders = build_ladders(scores, graph, rules)
    whole = float(loss({}))
    if not np.isfinite(whole):
        raise StructureError(f"allocation per_layer: the loss of the whole network on the calibration data is {whole}.")
    curves = {ladder.name: _damage(ladder, whole, loss, ratios) for ladder in ladders}

    def price(ladder: Ladder, block: int) -> float:
        return _interpolated(curves[ladder.name], ladder.removed_fraction(block))

    return cheapest_first(ladders, price, width_cost, limit)


def _damage(ladder: Ladder, whole: float, loss: Callable, ratios: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares that were tried and the loss increase there, non-decreasing, from (0, 0) on."""
    rungs = sorted(
        {min(range(len(ladder.widths)), key=lambda i, r=r: abs(ladder.removed_fraction(i) - r)) for r in ratios},
        reverse=True,
    )
    rungs = [rung for rung in rungs if rung < len(ladder.widths) - 1]
    increases = [loss({ladder.name: ladder.kept(rung)}) - whole for rung in rungs]
    # A loss that overflows is the worst there is, not a number to interpolate with.
    increases = [increase if np.isfinite(increase) else 1e30 for increase in increases]
    shares = [0.0, *(ladder.removed_fraction(rung) for rung in rungs)]
    return np.array(shares), np.array(list(accumulate([0.0, *increases], max)))


def _interpolated(curve: tuple[np.ndarray, np.ndarray], share: float) -> float:
    shares, increases = curve
    if len(shares) > 1 and share > shares[-1]:
        slope = (increases[-1] - increases[-2]) / (shares[-1] - shares[-2])
        return float(increases[-1] + slope * (share - shares[-1]))
    return float(np.interp(share, shares, increases))
