"""One network at one step: its graph, its scores, and the selections that meet limits."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from convette.cost import Budget, Cost, LatencyCost, LatencyTable, Limit, WidthCost, count, unreachable
from convette.pruning._calibration import cut, loss_of_cuts
from convette.pruning._cap_search import CapPoint, search_cap
from convette.pruning._measured import MeasuredLimits, worst
from convette.pruning._units import Scores
from convette.pruning.allocation import allocate, build_ladders
from convette.pruning.allocation._search import predicted, smallest_selection
from convette.pruning.criteria import score_units
from convette.pruning.settings import PruneSettings
from convette.surgery import ChannelGraph

Selection = Mapping[str, Tensor]


@dataclass
class Candidate:
    """A network about to be cut: what its units are worth and what its widths cost."""

    network: nn.Module
    graph: ChannelGraph
    width_cost: WidthCost
    scores: Scores
    settings: PruneSettings
    calibration: Sequence[tuple[Tensor, Tensor]]

    @property
    def cap_metric(self) -> str:
        """What stands for a measured cost between two measurements: latency by the table if there is one, or MACs."""
        return "latency" if isinstance(self.width_cost, LatencyCost) else "macs"

    def capped(self, selection: Selection) -> float:
        """Return the predicted `cap_metric` of a selection."""
        return float(predicted(self.width_cost, self.cap_metric, selection))

    def cap_limit(self, cap: float) -> Limit:
        """Return the limit ``cap_metric <= cap``."""
        return Limit(metric=self.cap_metric, percentile=None, value=cap, relative=False, engine=None)

    def cut(self, selection: Selection) -> nn.Module:
        """Return a copy of the network with only the units of `selection`."""
        return cut(copy.deepcopy(self.network), self.graph, selection)

    def smallest(self) -> Selection:
        """Return the selection with everything scored at its minimum."""
        return smallest_selection(build_ladders(self.scores, self.graph))

    def within(self, limits: Sequence[Limit]) -> Selection:
        """Return the selection that meets the (absolute, predictable) `limits`."""
        loss = None
        if self.calibration:
            again = self.settings.recalibrate
            loss = loss_of_cuts(self.network, self.graph, self.calibration, recalibrate=again)
        return allocate(
            self.settings.allocation,
            self.scores,
            self.graph,
            self.width_cost,
            limits,
            loss=loss,
            seed=self.settings.seed,
            options=self.settings.allocation_options,
        )


def prepare_candidate(
    free: ChannelGraph,
    sizes: Mapping[str, int],
    settings: PruneSettings,
    calibration: Sequence[tuple[Tensor, Tensor]],
    step: int,
    table: LatencyTable | None = None,
) -> Candidate:
    """Score the units of the network that `free` traces; `step` varies what is drawn at random.

    `sizes`: of the groups at the start, which shares are of. `table` lets latency be predicted.
    """
    network, example = free.model, free.example
    # What constraints leave alone the costs are predicted without them: they would hide sizes from the prediction.
    may_be_nothing = step > 1 or not settings.constraints
    graph = free.constrain(settings.width_constraints, sizes=sizes, allow_nothing=may_be_nothing)
    scores = score_units(
        settings.criterion,
        network,
        graph,
        calibration or None,
        seed=settings.seed + step,
        options=settings.criterion_options,
    )
    width_cost = LatencyCost(network, example, free, table) if table else WidthCost(network, example, free)
    return Candidate(network, graph, width_cost, scores, settings, calibration)


def check_reachable(candidate: Candidate, budget: Budget, start: Cost, measured: MeasuredLimits) -> Cost:
    """Return the smallest reachable cost; raise `BudgetError` with it if that network does not meet `budget`."""
    network = candidate.cut(candidate.smallest())
    smallest = count(network, measured.example)
    if measured.engines:
        latencies = measured.latencies({"smallest": network})
        start = replace(start, latency=latencies["start"])
        smallest = replace(smallest, latency=latencies["smallest"])
    resolved = budget.resolve(start)
    if not resolved.met(smallest):
        share = f"{candidate.settings.min_fraction:.0%}"
        if not candidate.graph.groups:
            why = f" ({candidate.graph.frozen[0]} holds channels)" if candidate.graph.frozen else ""
            raise unreachable(resolved, smallest, f"(Nothing in {type(network).__name__} can be removed{why}.)")
        wanted = f" and the constraints {candidate.settings.constraints!r}" if candidate.settings.constraints else ""
        raise unreachable(resolved, smallest, f"(min_fraction keeps {share} of every layer{wanted}; less may be set.)")
    return smallest


def reach_measured(
    candidate: Candidate,
    limits: Sequence[Limit],
    measured: MeasuredLimits,
    now: float,
    *,
    guess: float | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Selection, float | None]:
    """Return the largest selection that meets `limits` and the `measured` ones, and its cap on the `cap_metric`.

    Latency is measured on shrunk copies, interleaved with the start, and searched as a function of the MACs (or of the
    latency by the table) that are left; `now` is that of the network. The cap is None if no measured limit asks for
    one.
    """
    settings = candidate.settings
    plain = candidate.within(limits)
    smallest = candidate.smallest()
    networks = {"plain": candidate.cut(plain), "smallest": candidate.cut(smallest)}
    shares = {name: worst(rows) for name, rows in measured.shares(networks).items()}
    if shares["plain"] <= 1:
        return plain, None
    low = CapPoint(candidate.capped(smallest), shares["smallest"])
    high = CapPoint(min(now, candidate.capped(plain)), shares["plain"])
    found: dict[float, Selection] = {low.cap: smallest}

    def share_at(cap: float) -> float:
        found[cap] = candidate.within([*limits, candidate.cap_limit(cap)])
        share = worst(measured.shares({"candidate": candidate.cut(found[cap])})["candidate"])
        named = f"{cap / 1e6:.4g} M MACs" if candidate.cap_metric == "macs" else f"{cap:.4g} ms by the table"
        note(f"  {named}: {share:.1%} of the limit")
        return share

    best, _ = search_cap(share_at, low, high, guess=guess, margin=float(settings.latency_margin))
    return found[best.cap], best.cap
