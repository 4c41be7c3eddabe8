"""The best selection there is: a multiple-choice knapsack, solved by integer programming."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from convette._progress import note
from convette.cost import Limit, WidthCost
from convette.pruning._options import check_values
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation._search import (
    Rungs,
    absolute_limits,
    cheapest_first,
    fill_up,
    out_of_reach,
    predicted,
    selection_of,
)
from convette.surgery import ChannelGraph

MOST_WIDTHS = 24
SECONDS = 20.0


@dataclass(frozen=True)
class _Costs:
    """One limited metric for all choices of widths, relative to the bound: ``start - sum saving + sum overlap <= 1``.

    ``saving[g][i]`` is what group g saves alone on its rung i; ``overlap[a, b]`` times the units gone from a and from b
    is what two groups that share a layer save only once.
    """

    start: float
    saving: list[np.ndarray]
    overlap: np.ndarray


def exact(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[..., float] | None = None,
    most_widths: Annotated[int, Field(ge=2)] = MOST_WIDTHS,
    seconds: Annotated[float, Field(ge=0)] = SECONDS,
) -> dict[str, Tensor]:
    r"""Remove the units whose scores add up to the least among all choices that meet the limit.

    .. math:: \min_{x} \sum_g \sum_i x_{g,i}\, D_{g,i} \quad\text{s.t.}\quad \sum_i x_{g,i} = 1,\; cost(x) \le limit

    with :math:`x_{g,i} \in \{0, 1\}` choosing rung i of group g and D the sum of the scores of the units gone there.
    A layer between groups a and b costs the product of their widths; these products enter as they are (linearised with
    one variable for each rung of one of the two), so the cost is exact, not a sum over layers taken alone. HiGHS
    (`scipy.optimize.milp`) proves the optimum; scores have to compare between groups and to be at least 0.

    Groups of more than `most_widths` widths are solved on that many, evenly spaced, then again around the widths found
    until every width was a choice: the optimum of each such problem, not proven for all widths at once. After `seconds`
    in all the best found so far is taken, and `global_ranking`'s choice if nothing better was found (a note says so).

    Returns the kept units of every group that loses some. Raises `BudgetError` with the smallest reachable cost. Costs
    a cost prediction for each rung and pair of groups, and the solver's time: a fraction of a second for the CIFAR
    ResNets. `loss` is not used. Source: knapsack pruning after Aflalo et al., arXiv 2002.08258.
    """
    ladders = build_ladders(scores, graph, rules)
    check_values("allocation exact", exact, most_widths=most_widths, seconds=seconds)
    limits = absolute_limits(limit)

    def fits(rungs: Rungs) -> bool:
        selection = selection_of(ladders, rungs)
        return all(predicted(width_cost, one.metric, selection) <= one.value for one in limits)

    whole = {ladder.name: len(ladder.widths) - 1 for ladder in ladders}
    smallest = dict.fromkeys(whole, 0)
    if fits(whole):
        return {}
    if not fits(smallest):
        raise out_of_reach(limits, width_cost, selection_of(ladders, smallest))
    ranked = cheapest_first(ladders, lambda ladder, block: ladder.block_scores[block], width_cost, limits)
    best = {ladder.name: ladder.rung_of(ranked) for ladder in ladders}
    best = _refined(ladders, best, limits, width_cost, fits, most_widths, seconds)
    best = fill_up(ladders, best, fits)
    return selection_of(ladders, best)


def _refined(ladders, best, limits, width_cost, fits, most_widths, seconds) -> Rungs:
    import time

    damages = [damage(ladder) for ladder in ladders]
    deadline = time.monotonic() + seconds
    stride = max(1, *(-(-len(ladder.widths) // most_widths) for ladder in ladders)) if ladders else 1
    window: int | None = None
    while True:
        offered = [_offered(ladder, best[ladder.name], stride, window) for ladder in ladders]
        costs = [_costs(ladders, offered, width_cost, one) for one in limits]
        rungs, proven = _solve(ladders, offered, damages, costs, fits, max(0.1, deadline - time.monotonic()))
        if rungs is not None and _total(ladders, damages, rungs) < _total(ladders, damages, best):
            best = rungs
        if not proven:
            note("allocation exact: out of time; the best selection so far is taken, without proof")
            return best
        if stride == 1:
            return best
        window, stride = 2 * stride, max(1, stride // 4)


def _offered(ladder: Ladder, at: int, stride: int, window: int | None) -> list[int]:
    """Return the rungs of a group that the solver may choose, ascending; the one it stands on is one of them."""
    last = len(ladder.widths) - 1
    low, high = (0, last) if window is None else (max(0, at - window), min(last, at + window))
    return sorted({low, high, at, *range(low, high + 1, stride)})


def damage(ladder: Ladder) -> np.ndarray:
    """Return for every rung the sum of the scores of the units that are gone there."""
    sizes = np.diff(np.array(ladder.widths))
    gone = np.concatenate([np.cumsum((sizes * np.maximum(ladder.block_scores, 0.0))[::-1])[::-1], [0.0]])
    return gone.astype(float)


def _total(ladders: Sequence[Ladder], damages: Sequence[np.ndarray], rungs: Rungs) -> float:
    return sum(float(values[rungs[ladder.name]]) for ladder, values in zip(ladders, damages, strict=True))


def _costs(ladders: Sequence[Ladder], offered: Sequence[list[int]], width_cost: WidthCost, limit: Limit) -> _Costs:
    columns = [width_cost.groups.index(ladder.name) for ladder in ladders]
    full = torch.tensor(width_cost.sizes, dtype=torch.int64)
    start = float(width_cost.predict(limit.metric, full[None])[0])
    bound = max(float(limit.value), 1e-12)
    saving = []
    for ladder, column, rungs in zip(ladders, columns, offered, strict=True):
        trial = full.repeat(len(rungs), 1)
        trial[:, column] = torch.tensor([ladder.widths[rung] for rung in rungs])
        saving.append((start - width_cost.predict(limit.metric, trial).double().numpy()) / bound)
    pairs = [(a, b) for a in range(len(ladders)) for b in range(a) if len(offered[a]) > 1 and len(offered[b]) > 1]
    overlap = np.zeros((len(ladders), len(ladders)))
    if pairs:
        gone = [ladder.size - ladder.widths[rungs[0]] for ladder, rungs in zip(ladders, offered, strict=True)]
        trial = full.repeat(len(pairs), 1)
        for row, (a, b) in enumerate(pairs):
            trial[row, columns[a]] -= gone[a]
            trial[row, columns[b]] -= gone[b]
        left = width_cost.predict(limit.metric, trial).double().numpy() / bound
        for value, (a, b) in zip(left, pairs, strict=True):
            shared = value - (start / bound - saving[a][0] - saving[b][0])
            if abs(shared) * bound > 0.5:
                overlap[a, b] = shared / (gone[a] * gone[b])
    return _Costs(start / bound, saving, overlap)


def _solve(ladders, offered, damages, costs, fits, seconds) -> tuple[Rungs | None, bool]:
    """Solve one problem; returns the rungs (None where none was found) and whether they are proven best."""
    from scipy.optimize import Bounds, milp

    problem = _problem(ladders, offered, damages, costs)
    slack = 0.0
    for _ in range(4):
        found = milp(
            problem.objective,
            integrality=problem.integrality,
            bounds=Bounds(np.zeros(len(problem.upper)), problem.upper),  # type: ignore[arg-type]
            constraints=problem.constraints(1.0 - slack),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None, found.status == 2
        rungs = {
            ladder.name: choice[int(np.argmax(found.x[first : first + len(choice)]))]
            for ladder, choice, first in zip(ladders, offered, problem.first, strict=True)
        }
        if fits(rungs):
            return rungs, found.status == 0
        # The solver works to a tolerance; the budget does not.
        slack = max(2 * slack, 2e-6)
    return None, False


@dataclass
class _Problem:
    objective: np.ndarray
    integrality: np.ndarray
    upper: np.ndarray
    first: list[int]
    choices: list
    budget_rows: list[tuple[np.ndarray, float]]
    links: list

    def constraints(self, share: float) -> list:
        from scipy.optimize import LinearConstraint

        rows = np.stack([row for row, _ in self.budget_rows])
        bounds = np.array([share - start for _, start in self.budget_rows])
        return [*self.choices, *self.links, LinearConstraint(rows, -np.inf, bounds)]  # type: ignore[arg-type]


def _problem(ladders, offered, damages, costs) -> _Problem:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import lil_array

    first = list(np.cumsum([0, *(len(choice) for choice in offered)]))
    binaries = first.pop()
    gone = [
        np.array([ladder.size - ladder.widths[rung] for rung in choice], dtype=float)
        for ladder, choice in zip(ladders, offered, strict=True)
    ]
    pairs = [
        (a, b) if len(offered[a]) >= len(offered[b]) else (b, a)
        for a in range(len(ladders))
        for b in range(a)
        if any(one.overlap[a, b] for one in costs)
    ]
    # One variable for each rung of the group with fewer: the units gone from the other group if that rung is chosen.
    products = list(np.cumsum([binaries, *(len(offered[b]) for _, b in pairs)]))
    variables = int(products.pop())
    objective = np.zeros(variables)
    objective[:binaries] = np.concatenate([damages[g][choice] for g, choice in enumerate(offered)])
    objective /= max(1e-30, float(objective.max(initial=0.0)))
    one_each = lil_array((len(ladders), variables))
    for g, choice in enumerate(offered):
        one_each[g, first[g] : first[g] + len(choice)] = 1
    rows = []
    for one in costs:
        row = np.zeros(variables)
        for g, choice in enumerate(offered):
            row[first[g] : first[g] + len(choice)] = -one.saving[g]
        for (a, b), start in zip(pairs, products, strict=True):
            row[start : start + len(offered[b])] += one.overlap[max(a, b), min(a, b)] * gone[b]
        rows.append((row, one.start))
    upper = np.ones(variables)
    links = []
    for (a, b), start in zip(pairs, products, strict=True):
        count, most = len(offered[b]), max(float(gone[a].max()), 1.0)
        upper[start : start + count] = most
        # The product is all of a's units, spread over b's rungs: p_j <= most x_j and sum_j p_j = gone_a.
        ties = lil_array((count + 1, variables))
        for j in range(count):
            ties[j, start + j] = 1
            ties[j, first[b] + j] = -most
        ties[count, start : start + count] = 1
        ties[count, first[a] : first[a] + len(offered[a])] = -gone[a]
        low = np.array([-np.inf] * count + [0.0])
        links.append(LinearConstraint(ties.tocsr(), low, np.zeros(count + 1)))  # type: ignore[arg-type]
    integrality = np.concatenate([np.ones(binaries), np.zeros(variables - binaries)])
    choices = [LinearConstraint(one_each.tocsr(), 1, 1)]
    return _Problem(objective, integrality, upper, [int(i) for i in first], choices, rows, links)
