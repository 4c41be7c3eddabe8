"""Evolution of the shares that groups keep, judged by the loss of the cut network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.pruning._options import check_values
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import WidthRules, build_ladders
from convette.pruning.allocation._scaling import scaled_rungs
from convette.pruning.allocation._search import absolute_limits, cheapest_first, selection_of
from convette.surgery import ChannelGraph

STRENGTH = 0.3


def evolution(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[[Mapping[str, Tensor]], float] | None = None,
    population: Annotated[int, Field(ge=3)] = 10,
    generations: Annotated[int, Field(ge=0)] = 6,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Search the shares of all groups by evolution: every candidate meets the limit, the lowest loss wins.

    A genome is a logarithm of a share for each group; one common factor t makes it meet the limits exactly
    (:math:`C'_g = \mathrm{round}(t\, e^{x_g} C_g)`), so no evaluation is spent on networks that do not fit. Within a
    group the highest scores stay. The first generation holds equal shares and `global_ranking`'s choice, so the result
    is no worse than either by `loss`; then tournaments of three, crossover group by group, normal mutations of 0.3, the
    best two go on. The loop is our own: pymoo is no dependency, and SciPy's differential evolution wants a population
    that grows with the number of groups, where one evaluation here is a pass over the calibration images.

    Returns the kept units of every group that loses some; the same for the same `seed`. Raises `BudgetError` with the
    smallest reachable cost, `UsageError` without `loss` or for a `population` below 3. Costs about
    ``population * (generations + 1)`` losses, each choice of widths once. Source: the search of He et al., AMC, arXiv
    1802.03494, with evolution for its agent.
    """
    if loss is None:
        raise UsageError("allocation evolution measures the loss: give a data set, or use global or uniform.")
    check_values("allocation evolution", evolution, population=population, generations=generations)
    ladders = build_ladders(scores, graph, rules)
    limits = absolute_limits(limit)
    sizes = {ladder.name: ladder.size for ladder in ladders}
    draw = np.random.default_rng(seed)
    seen: dict[tuple[int, ...], float] = {}

    def rungs_of(genome: np.ndarray) -> tuple[int, ...]:
        ratios = {ladder.name: float(np.exp(x)) for ladder, x in zip(ladders, genome, strict=True)}
        rungs = scaled_rungs(ladders, ratios, sizes, limits, width_cost)
        return tuple(rungs[ladder.name] for ladder in ladders)

    def price(rungs: tuple[int, ...]) -> float:
        if rungs not in seen:
            value = float(loss(selection_of(ladders, dict(zip(sizes, rungs, strict=True)))))
            seen[rungs] = value if np.isfinite(value) else float("inf")
        return seen[rungs]

    ranked = cheapest_first(ladders, lambda ladder, block: ladder.block_scores[block], width_cost, limits)
    if not ranked:
        return {}
    start = np.array([np.log(ladder.widths[ladder.rung_of(ranked)] / ladder.size) for ladder in ladders])
    price(tuple(ladder.rung_of(ranked) for ladder in ladders))
    genomes = [np.zeros(len(ladders)), start]
    genomes += [draw.normal(0, 2 * STRENGTH, len(ladders)) + start * (i % 2) for i in range(population - 2)]
    prices = [price(rungs_of(genome)) for genome in genomes]
    for _ in range(generations):
        order = np.argsort(prices, kind="stable")
        elite = [genomes[i] for i in order[:2]]
        children = []
        for _ in range(population - len(elite)):
            one, other = (genomes[min(draw.integers(len(genomes), size=3), key=lambda i: prices[i])] for _ in range(2))
            child = np.where(draw.random(len(ladders)) < 0.5, one, other)
            children.append(child + draw.normal(0, STRENGTH, len(ladders)) * (draw.random(len(ladders)) < 0.5))
        genomes = [*elite, *children]
        prices = [price(rungs_of(genome)) for genome in genomes]
    best = min(seen, key=lambda rungs: seen[rungs])
    return selection_of(ladders, dict(zip(sizes, best, strict=True)))
