"""The same share from every group."""

from collections.abc import Callable, Sequence

from torch import Tensor

from convette.cost import Limit, WidthCost
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import WidthRules, build_ladders
from convette.pruning.allocation._search import cheapest_first
from convette.surgery import ChannelGraph


def uniform(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[..., float] | None = None,
) -> dict[str, Tensor]:
    r"""Remove the same share r of every scored group, its lowest scores first.

    .. math:: |K_g| \approx (1 - r)\,|g|, \qquad r = \min\{r : cost(K) \le limit\}

    up to the rounding of widths; the scores only compare within a group. What fits again below the limit is taken back,
    at most a block from each group.

    Returns the kept units of every group that loses some. Raises `BudgetError` with the smallest reachable cost.
    Costs about log2(units) + groups cost predictions; `loss` is not used.
    """
    ladders = build_ladders(scores, graph, rules)
    return cheapest_first(
        ladders, lambda ladder, block: ladder.removed_fraction(block), width_cost, limit, taken_back=1
    )
