"""One ranking across the whole network."""

from collections.abc import Callable, Sequence

from torch import Tensor

from convette.cost import Limit, WidthCost
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import WidthRules, build_ladders
from convette.pruning.allocation._search import cheapest_first
from convette.surgery import ChannelGraph


def global_ranking(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[..., float] | None = None,
) -> dict[str, Tensor]:
    r"""Remove the units that score least, wherever they are, until the limit is met.

    .. math:: K_g = \{u : s_{g,u} > t\}, \qquad t = \min\{t : cost(K) \le limit\}

    One threshold t for all groups, so the scores have to compare between groups. Where `rules` or a group's constraints
    tie units together, blocks of units are ranked by their mean score. What fits again below the limit is taken back.

    Returns the kept units of every group that loses some. Raises `BudgetError` with the smallest reachable cost.
    Costs about log2(units) + groups cost predictions; `loss` is not used.
    """
    ladders = build_ladders(scores, graph, rules)
    return cheapest_first(ladders, lambda ladder, block: ladder.block_scores[block], width_cost, limit)
