"""Pruning while training: the network narrows under the live optimiser, a little at a time."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.cost import Budget, Limit, WidthCost, count
from convette.errors import UsageError
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._measured import MEASURED
from convette.pruning.allocation import NEED_DATA as NEED_LOSS
from convette.pruning.allocation import WidthRules, find_allocation
from convette.pruning.criteria import NEED_DATA, check_options, score_units
from convette.surgery import ChannelGraph, trace
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer


class GradualPruning(Method):
    r"""Narrow the network during training until it fits `budget`; what is left of every optimiser state goes on.

    At `times` optimiser steps, evenly spaced between the shares `begin` and `end` of the training, the units are scored
    anew and the network is shrunk for real. After cut j of n every limited cost c is at most

    .. math:: c_j = c_0\,(b / c_0)^{1 - (1 - j/n)^3}

    with the bound b: fast at first, when much is redundant, slower towards the end.

    Args:
        budget: limits on macs, parameters or size (of one image), absolute or relative to the start of the training.
        criterion: as in `PruneSettings`, like the four below.
        criterion_options: as there.
        multiple_of: as there.
        min_fraction: as there.
        seed: as there.
        allocation: "global" or "uniform".
        begin: when the first cut is made, see above.
        end: when the last one is made.
        times: how many cuts are made.
        calibration: batches of (images, labels), ready for the network, for the criteria that need them.

    Costs a trace and a scoring at each cut; steps become cheaper as the network does. Raises `BudgetError` at the first
    cut if the budget cannot be reached, `UsageError` for choices that cannot be. Source of the curve: Zhu and Gupta, To
    Prune, or Not to Prune, arXiv 1710.01878.
    """

    name = "pruning"
    order = -100
    events = frozenset({Event.BATCH_START})
    changes_structure = True

    def __init__(
        self,
        budget: Budget | str,
        *,
        criterion: str = "l1",
        criterion_options: Mapping[str, Any] | None = None,
        allocation: str = "global",
        begin: float = 0.1,
        end: float = 0.7,
        times: int = 8,
        multiple_of: int = 1,
        min_fraction: float = 0.1,
        calibration: Iterable[tuple[Tensor, Tensor]] = (),
        seed: int = 0,
    ) -> None:
        self.budget = Budget.parse(budget) if isinstance(budget, str) else budget
        measured = [str(limit) for limit in self.budget.limits if limit.metric in MEASURED]
        if measured:
            raise UsageError(f"pruning during training counts, it does not measure: {measured[0]} is for `prune`.")
        if not 0 <= begin <= end <= 1 or times < 1:
            raise UsageError(
                f"gradual pruning: begin={begin}, end={end}, times={times} is no schedule; 0<=begin<=end<=1."
            )
        check_options(criterion, criterion_options or {})
        if allocation in NEED_LOSS:
            raise UsageError(
                f"allocation {allocation} measures losses, too slow during training; use global or uniform."
            )
        self.calibration = list(calibration)
        if criterion in NEED_DATA and not self.calibration:
            raise UsageError(f"criterion {criterion} needs calibration batches; give them, or use l1, l2 or lamp.")
        self.criterion, self.criterion_options = criterion, dict(criterion_options or {})
        self.allocation, self.multiple_of, self.min_fraction = allocation, multiple_of, min_fraction
        self.begin, self.end, self.times, self.seed = begin, end, times, seed
        self.cuts = 0
        self.start: dict[str, float] = {}
        self.bounds: dict[str, float] = {}
        self.minimum: dict[str, int] = {}

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Cut where a cut is due."""
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        due = sum(trainer.state.clock.step >= self._moment(cut, total) for cut in range(self.times))
        if due > self.cuts:
            self.cuts = due
            self._cut(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pruning is, and what its relative limits are relative to."""
        return {"cuts": self.cuts, "start": self.start, "bounds": self.bounds, "minimum": self.minimum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.cuts = int(state["cuts"])
        self.start, self.bounds = dict(state["start"]), dict(state["bounds"])
        self.minimum = {name: int(units) for name, units in state["minimum"].items()}

    def _moment(self, cut: int, total: int) -> int:
        share = self.begin + (self.end - self.begin) * cut / max(1, self.times - 1)
        return min(round(share * total), total - 1)

    def _cut(self, trainer: "Trainer") -> None:
        graph = trace(trainer.state.model, one_image(trainer.state.example))
        chosen = decided_by_main_rank(lambda: self.choose(trainer, graph))
        if chosen:
            trainer.edit_structure([graph.shrink({name: torch.tensor(kept) for name, kept in chosen.items()})])

    def choose(self, trainer: "Trainer", graph: ChannelGraph) -> dict[str, list[int]]:
        """Return the units that stay after this cut (``self.cuts``), of every group that loses some."""
        model, example = trainer.state.model, one_image(trainer.state.example)
        first = not self.start
        if first:
            self._start_from(model, example, graph)
        scores = score_units(
            self.criterion,
            model,
            graph,
            self.calibration or None,
            seed=self.seed + self.cuts,
            options=self.criterion_options,
        )
        allocate = find_allocation(self.allocation)
        rules = WidthRules(self.multiple_of, self.minimum)
        width_cost = WidthCost(model, example, graph)
        if first:  # raises now, not when much has been trained, if the end cannot be reached
            allocate(scores, graph, width_cost, self._limits(1.0), rules=rules)
        limits = self._limits(1 - (1 - min(1.0, self.cuts / self.times)) ** 3)
        selection = allocate(scores, graph, width_cost, limits, rules=rules)
        return {name: kept.tolist() for name, kept in selection.items()}

    def _start_from(self, model: nn.Module, example: Any, graph: ChannelGraph) -> None:
        cost = count(model, example)
        self.start = {limit.metric: float(cost.get(limit.metric)) for limit in self.budget.limits}
        self.bounds = {limit.metric: float(limit.value) for limit in self.budget.resolve(cost).limits}
        self.minimum = {group.name: math.ceil(self.min_fraction * group.size) for group in graph.groups}

    def _limits(self, share: float) -> list[Limit]:
        limits = []
        for metric, bound in self.bounds.items():
            start = self.start[metric]
            value = bound if start <= bound else start * (bound / start) ** share
            limits.append(Limit(metric=metric, percentile=None, value=value, relative=False, engine=None))
        return limits


def one_image(example: Any) -> Any:
    """Return the first image of a trainer's example."""
    images = example[0] if isinstance(example, tuple | list) else example
    return images[:1]
