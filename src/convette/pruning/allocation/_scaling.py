"""From the shares that groups should keep to widths that meet a limit: one factor on all of them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from convette.cost import Limit, WidthCost
from convette.pruning.allocation._ladder import Ladder
from convette.pruning.allocation._search import Rungs, fill_up, out_of_reach, selection_of


def scaled_rungs(
    ladders: Sequence[Ladder],
    ratios: Mapping[str, float],
    sizes: Mapping[str, int],
    limits: Sequence[Limit],
    width_cost: WidthCost,
) -> Rungs:
    """Return the rungs nearest to t times the wanted widths, for the largest t that meets `limits`."""

    def rungs_at(t: float) -> Rungs:
        found = {}
        for ladder in ladders:
            wanted = min(1.0, t) if ladder.name not in ratios else t * ratios[ladder.name]
            width = wanted * sizes[ladder.name]
            found[ladder.name] = int(np.abs(np.array(ladder.widths) - width).argmin())
        return found

    columns = {ladder.name: width_cost.groups.index(ladder.name) for ladder in ladders}
    here = torch.tensor(width_cost.sizes, dtype=torch.int64)

    def fits(rungs: Rungs) -> bool:
        # Straight from widths: this is asked a hundred times for each candidate of a search.
        for ladder in ladders:
            here[columns[ladder.name]] = ladder.widths[rungs[ladder.name]]
        return all(float(width_cost.predict(one.metric, here[None])[0]) <= one.value for one in limits)

    smallest = {ladder.name: 0 for ladder in ladders}
    if not fits(smallest):
        raise out_of_reach(limits, width_cost, selection_of(ladders, smallest))
    low, high = 0.0, 1.0
    while fits(rungs_at(high)) and high < 1e9:
        if all(rungs_at(high)[ladder.name] == len(ladder.widths) - 1 for ladder in ladders):
            return rungs_at(high)
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(rungs_at(middle)) else (low, middle)
    rungs = rungs_at(low) if fits(rungs_at(low)) else smallest
    return fill_up(ladders, rungs, fits)
