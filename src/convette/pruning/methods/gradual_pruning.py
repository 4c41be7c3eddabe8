"""Pruning while training: the network narrows under the live optimiser, a little at a time."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.cost import Budget, Limit, WidthCost, count
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning._calibration import draw_calibration, loss_of_cuts
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._measured import MEASURED
from convette.pruning._widths import sizes_of, width_constraints
from convette.pruning.allocation import NEED_DATA as NEED_LOSS
from convette.pruning.allocation import allocate, find_allocation
from convette.pruning.allocation import check_options as check_allocation_options
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
        criterion: as in `PruneSettings`, like the eight below.
        criterion_options: as there.
        allocation: as there.
        allocation_options: as there.
        multiple_of: as there.
        min_fraction: as there.
        constraints: as there.
        calibration_images: as there.
        seed: as there.
        begin: when the first cut is made, see above.
        end: when the last one is made.
        times: how many cuts are made.
        calibration: batches of (images, labels), ready for the network, for the criteria and allocations that need
            them.
        data: what `calibration_images` are drawn from where no `calibration` is given (a recipe fills it in).

    Costs a trace, a scoring and an allocation at each cut; steps become cheaper as the network does. Raises
    `BudgetError` at the first cut if the budget cannot be reached, `UsageError` for choices that cannot be. Source of
    the curve: Zhu and Gupta, To Prune, or Not to Prune, arXiv 1710.01878.
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
        allocation_options: Mapping[str, Any] | None = None,
        begin: float | int = 0.1,
        end: float | int = 0.7,
        times: int = 8,
        multiple_of: int = 1,
        min_fraction: float | int = 0.1,
        constraints: str = "",
        calibration_images: int = 256,
        calibration: Iterable[tuple[Tensor, Tensor]] = (),
        data: ImageData | None = None,
        seed: int = 0,
    ) -> None:
        self.budget = Budget.parse(budget) if isinstance(budget, str) else budget
        measured = [str(limit) for limit in self.budget.limits if limit.metric in MEASURED]
        if measured:
            raise UsageError(f"pruning during training counts, it does not measure: {measured[0]} is for `prune`.")
        if not 0 <= begin <= end <= 1 or times < 1 or calibration_images < 1:
            raise UsageError(
                f"{self.name}: begin={begin}, end={end}, times={times}, calibration_images={calibration_images} is no"
                " schedule; 0<=begin<=end<=1, and at least 1 of the others."
            )
        check_options(criterion, criterion_options or {})
        check_allocation_options(allocation, allocation_options or {})
        self.wanted = width_constraints(constraints, multiple_of, min_fraction)
        self.calibration, self.data = list(calibration), data
        for what, chosen, needing, instead in (
            ("criterion", criterion, NEED_DATA, "l1, l2 or lamp"),
            ("allocation", allocation, NEED_LOSS, "global or uniform"),
        ):
            if chosen in needing and not self.calibration and data is None:
                raise UsageError(
                    f"{self.name}: {what} {chosen} needs calibration batches, or data to draw them from; give them, or"
                    f" use {instead}."
                )
        self.criterion, self.criterion_options = criterion, dict(criterion_options or {})
        self.allocation, self.allocation_options = allocation, dict(allocation_options or {})
        self.constraints, self.calibration_images = constraints, calibration_images
        self.begin, self.end, self.times, self.seed = float(begin), float(end), times, seed
        self.cuts = 0
        self.start: dict[str, float] = {}
        self.bounds: dict[str, float] = {}
        # Shares are of what the training started with, not of what the last cut left.
        self.sizes: dict[str, int] = {}

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Cut where a cut is due."""
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        due = sum(trainer.state.clock.step >= self._moment(cut, total) for cut in range(self.times))
        if due > self.cuts:
            self.cuts = due
            self._cut(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pruning is, and what its relative limits are relative to."""
        return {"cuts": self.cuts, "start": self.start, "bounds": self.bounds, "sizes": self.sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.cuts = int(state["cuts"])
        self.start, self.bounds = dict(state["start"]), dict(state["bounds"])
        self.sizes = {name: int(units) for name, units in state["sizes"].items()}

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
        # What constraints leave alone the costs are predicted without them: they would hide sizes from the prediction.
        free = graph
        may_be_nothing = not first or not self.constraints
        graph = free.constrain(self.wanted, sizes=self.sizes, allow_nothing=may_be_nothing)
        batches = self._batches(trainer)
        scores = score_units(
            self.criterion,
            model,
            graph,
            batches or None,
            seed=self.seed + self.cuts,
            options=self.criterion_options,
        )
        width_cost = WidthCost(model, example, free)
        if first:  # raises now, not when much has been trained, if the end cannot be reached
            find_allocation("global")(scores, graph, width_cost, self._limits(1.0))
        limits = self._limits(1 - (1 - min(1.0, self.cuts / self.times)) ** 3)
        selection = allocate(
            self.allocation,
            scores,
            graph,
            width_cost,
            limits,
            loss=loss_of_cuts(model, graph, batches) if self.allocation in NEED_LOSS else None,
            seed=self.seed,
            options=self.allocation_options,
        )
        return {name: kept.tolist() for name, kept in selection.items()}

    def _batches(self, trainer: "Trainer") -> list[tuple[Tensor, Tensor]]:
        needed = self.criterion in NEED_DATA or self.allocation in NEED_LOSS
        if needed and not self.calibration and self.data is not None:
            device = trainer.state.device
            self.calibration = draw_calibration(self.data, self.calibration_images, seed=self.seed, device=device)
        return self.calibration

    def _start_from(self, model: nn.Module, example: Any, graph: ChannelGraph) -> None:
        cost = count(model, example)
        self.start = {limit.metric: float(cost.get(limit.metric)) for limit in self.budget.limits}
        self.bounds = {limit.metric: float(limit.value) for limit in self.budget.resolve(cost).limits}
        self.sizes = sizes_of(graph)

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
