"""The cheapest blocks first, as few as meet the limits: the search that all allocations share."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from convette.cost import Budget, Cost, LatencyCost, Limit, WidthCost, unreachable
from convette.errors import BudgetError, UsageError
from convette.pruning.allocation._ladder import Ladder

PREDICTED = ("macs", "parameters", "size")
Rungs = dict[str, int]


def cheapest_first(
    ladders: Sequence[Ladder],
    price: Callable[[Ladder, int], float],
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    taken_back: int | None = None,
) -> dict[str, Tensor]:
    """Remove blocks in ascending `price` until every limit is met, then take back what still fits.

    ``price(ladder, i)`` is the price of block i and must not increase with i. Bisects on the number of removed blocks,
    exact to one block because costs never rise when units go; then offers each group its dearest removed blocks back,
    at most `taken_back` of them (None: as many as fit).
    Returns a selection that leaves out the groups that stay whole. Raises `BudgetError` with the smallest reachable
    cost. Costs about log2(blocks) + groups evaluations of `width_cost`.
    """
    limits = absolute_limits(limit)
    blocks = sorted(
        (
            (price(ladder, i), position, -i)
            for position, ladder in enumerate(ladders)
            for i in range(len(ladder.widths) - 1)
        )
    )

    def rungs_after(removed: int) -> Rungs:
        rungs = {ladder.name: len(ladder.widths) - 1 for ladder in ladders}
        for _, position, negative in blocks[:removed]:
            name = ladders[position].name
            rungs[name] = min(rungs[name], -negative)
        return rungs

    def fits(rungs: Rungs) -> bool:
        selection = selection_of(ladders, rungs)
        return all(predicted(width_cost, one.metric, selection) <= one.value for one in limits)

    if fits(rungs_after(0)):
        return {}
    if not fits(rungs_after(len(blocks))):
        raise out_of_reach(limits, width_cost, selection_of(ladders, rungs_after(len(blocks))))
    too_few, enough = 0, len(blocks)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(rungs_after(middle)) else (middle, enough)
    removed = [(ladders[position], -negative) for _, position, negative in blocks[:enough]]
    return selection_of(ladders, _refill(removed, rungs_after(enough), fits, taken_back))


def _refill(
    removed: list[tuple[Ladder, int]], rungs: Rungs, fits: Callable[[Rungs], bool], taken_back: int | None
) -> Rungs:
    lowest = rungs
    full = set()
    for ladder, block in reversed(removed):
        name = ladder.name
        if name in full or (taken_back is not None and rungs[name] - lowest[name] >= taken_back):
            continue
        larger = {**rungs, name: block + 1}
        if fits(larger):
            rungs = larger
        else:
            full.add(name)
    return rungs


def fill_up(ladders: Sequence[Ladder], rungs: Rungs, fits: Callable[[Rungs], bool]) -> Rungs:
    """Give units back, the dearest block that fits first, until none fits any more."""
    rungs = dict(rungs)
    open_ = {ladder.name: ladder for ladder in ladders if rungs[ladder.name] < len(ladder.widths) - 1}
    while open_:
        name = max(open_, key=lambda name: open_[name].block_scores[rungs[name]])
        if fits({**rungs, name: rungs[name] + 1}):
            rungs[name] += 1
            if rungs[name] < len(open_[name].widths) - 1:
                continue
        del open_[name]
    return rungs


def selection_of(ladders: Sequence[Ladder], rungs: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the kept units of every group that is not whole."""
    return {
        ladder.name: ladder.kept(rungs[ladder.name])
        for ladder in ladders
        if rungs[ladder.name] < len(ladder.widths) - 1
    }


def smallest_selection(ladders: Sequence[Ladder]) -> dict[str, Tensor]:
    """Return the selection with every group on its lowest rung."""
    return selection_of(ladders, {ladder.name: 0 for ladder in ladders})


def predicted(width_cost: WidthCost, metric: str, selection: Mapping[str, Tensor]) -> float | int:
    """Return the cost of a selection on one of the metrics in `PREDICTED`, or the latency of a `LatencyCost`."""
    if metric == "macs":
        return float(width_cost.macs(selection))
    if metric == "parameters":
        return float(width_cost.parameters(selection))
    if metric == "size":
        return float(width_cost.size(selection))
    if metric == "latency" and isinstance(width_cost, LatencyCost):
        return width_cost.latency(selection)
    raise UsageError(f"{metric} cannot be predicted from the widths; an allocation takes {', '.join(PREDICTED)}.")


def absolute_limits(limit: Limit | Sequence[Limit]) -> tuple[Limit, ...]:
    """Return the limits as a tuple; `UsageError` for one that is still relative to a start."""
    limits = (limit,) if isinstance(limit, Limit) else tuple(limit)
    for one in limits:
        if one.relative:
            raise UsageError(
                f"{one}: an allocation needs an absolute limit; resolve the budget against the start first."
            )
    return limits


def out_of_reach(limits: Sequence[Limit], width_cost: WidthCost, smallest: Mapping[str, Tensor]) -> BudgetError:
    """Return the error that says which limit is missed by the smallest selection, and by how much."""
    for one in limits:
        if one.metric == "latency" and (least := predicted(width_cost, "latency", smallest)) > one.value:
            return BudgetError(
                f"The budget '{one}' cannot be reached: by the latency table the smallest network takes {least:.3g} ms."
                " Raise the limit, start from a smaller model, or lower min_fraction."
            )
    macs, parameters, size = (int(predicted(width_cost, metric, smallest)) for metric in PREDICTED)
    limits = [one for one in limits if one.metric != "latency"]
    cost = Cost(parameters=parameters, macs=macs, size=size, memory=0)
    return unreachable(Budget(tuple(limits)), cost, "(min_fraction and multiple_of bound how far layers shrink.)")
