"""Progressive gradient pruning: a little goes after each epoch (Nguyen-Meidine et al., arXiv 1906.08746).

As in the authors' code, but for two of its faults: the budget of epoch e is taken at e, not at e + 1, and a filter that
is reset keeps its batch norm, so that its gradients do not vanish and it can come back.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convette.cost import Budget, WidthCost, count
from convette.data import ImageData
from convette.errors import BudgetError, UsageError
from convette.layers._watching import in_eval
from convette.pruning._calibration import draw_calibration
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._units import tensors_of
from convette.pruning.allocation import build_ladders
from convette.pruning.criteria import NEED_DATA, check_options, score_units
from convette.pruning.criteria.grad_change import made_by, sums_of_units
from convette.pruning.methods._units import check_groups, clear_state, groups_of
from convette.pruning.methods.gradual_pruning import one_image
from convette.surgery import ChannelGraph, trace
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer

_PSFP = -math.log(0.147)  # k E of the sheet's curve: a quarter of the rate at an eighth of the epochs
_LIVELY = 1e-2  # the least shift of a norm behind a reset filter: with none, ReLU would stop its gradients


class ProgressiveGradientPruning(Method):
    r"""Prune during one training: after each epoch the units whose weights change least go, or start again.

    After epoch e of the E pruning epochs a group of N_0 units at the start may have

    .. math:: n(e) = N_0\,(1 - p)^{e/E}, \qquad \text{"linear"}: N_0 (1 - p\,e/E), \qquad
        \text{"psfp"}: N_0 \Bigl(1 - p\,\frac{1 - 0.147^{e/E}}{1 - 0.147}\Bigr)

    Of the units above that, those with the least gradient (or the least by `criterion`), the share `remove` is cut out
    of the network under the live optimiser; the others' weights and momenta are set to zero and they stay to learn
    anew. In the last pruning epoch all of them are cut, which leaves N_0 - floor(p N_0) units.

    - `rate` (p, default 0.5): the share of every group's units that goes; or `budget`: limits on macs, parameters or
      size, from which the smallest such p follows.
    - `epochs` (E): by default 0.6 of the training's. `remove` (0.5): 1 is purely hard, 0 purely soft pruning.
    - `mode`: "per_batch" (default, RPGP) sums the gradients' L1 norms while training, at no cost; "accumulate" (PGP)
      runs once more over the training set at fixed weights, at most `passes` batches of it (None: all).
    - `criterion`: the name of any criterion in place of the change by gradient, scored anew after each epoch, with
      `criterion_options`. Those that need images take `calibration`, batches of (images, labels) ready for the network,
      or `calibration_images` drawn from `data` by `seed` (a recipe fills `data` in). Groups it does not score stay.
    - `decay`: "exponential", "linear" or "psfp", which starts fast. ``criterion="l2", remove=0, decay="psfp"`` is
      progressive soft filter pruning. `groups`: "all", or "inner" ones only (no residual streams).

    Raises `UsageError` for choices that cannot be, `BudgetError` for a budget that no p meets. The network keeps at
    least one unit a group. Fewer units, faster epochs; nothing remains at inference.
    """

    name = "progressive_gradient_pruning"
    order = -100
    events = frozenset({Event.FIT_START, Event.GRADIENTS_READY, Event.STRUCTURE_CHANGED, Event.EPOCH_END})
    changes_structure = True

    def __init__(
        self,
        rate: float | int = 0.5,
        *,
        budget: str | None = None,
        epochs: int | None = None,
        remove: float | int = 0.5,
        mode: str = "per_batch",
        passes: int | None = None,
        decay: str = "exponential",
        groups: str = "all",
        criterion: str | None = None,
        criterion_options: Mapping[str, Any] | None = None,
        calibration_images: int = 256,
        calibration: Iterable[tuple[Tensor, Tensor]] = (),
        data: ImageData | None = None,
        seed: int = 0,
    ) -> None:
        for option, value, known in (
            ("mode", mode, ("per_batch", "accumulate")),
            ("decay", decay, ("exponential", "linear", "psfp")),
        ):
            if value not in known:
                raise UsageError(f"{self.name}: {option}={value!r} is none of {', '.join(map(repr, known))}.")
        if not 0 <= rate < 1 or not 0 <= remove <= 1 or (epochs is not None and epochs < 1):
            raise UsageError(
                f"{self.name}: rate={rate} and remove={remove} must be shares, epochs={epochs} at least 1."
            )
        check_groups(groups, self.name)
        self.calibration, self.data = list(calibration), data
        self.criterion, self.criterion_options = criterion, dict(criterion_options or {})
        self.calibration_images, self.seed = calibration_images, seed
        self._check_criterion(mode, passes)
        self.rate, self.remove, self.mode, self.passes = float(rate), float(remove), mode, passes
        self.budget, self.epochs, self.decay, self.groups = budget, epochs, decay, groups
        self.done = 0
        self.sizes: dict[str, int] = {}
        self.changes: dict[str, Tensor] = {}
        self._graph: ChannelGraph | None = None

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Start, gather gradients, cut."""
        if event in (Event.FIT_START, Event.STRUCTURE_CHANGED):
            self._graph = trace(trainer.state.model, one_image(trainer.state.example))
            if not self.sizes:
                self._begin(trainer)
        elif event is Event.GRADIENTS_READY and self._gathers and self.done < (self.epochs or 0):
            for name, change in self._norms(trainer).items():
                self.changes[name] = self.changes[name] + change if name in self.changes else change
        elif event is Event.EPOCH_END and self.done < (self.epochs or 0):
            self.done += 1
            if self.criterion is None and self.mode == "accumulate":
                self.changes = self._once_more(trainer)
            self._cut(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pruning is."""
        pruned = {"done": self.done, "sizes": self.sizes, "changes": self.changes}
        return {**pruned, "rate": self.rate, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.done, self.rate, self.epochs = int(state["done"]), float(state["rate"]), int(state["epochs"])
        self.sizes = {name: int(size) for name, size in state["sizes"].items()}
        self.changes = dict(state["changes"])

    def allowed(self, size: int, epoch: int) -> int:
        """Return how many of `size` units a group may have after pruning epoch `epoch` (1-based)."""
        total = self.epochs or 1
        if epoch >= total:
            return max(1, size - math.floor(size * self.rate + 1e-9))
        if self.decay == "exponential":
            share = (1 - self.rate) ** (epoch / total)
        elif self.decay == "linear":
            share = 1 - self.rate * epoch / total
        else:
            share = 1 - self.rate * math.expm1(-_PSFP * epoch / total) / math.expm1(-_PSFP)
        return max(1, math.ceil(size * share - 1e-9))

    @property
    def _gathers(self) -> bool:
        return self.criterion is None and self.mode == "per_batch"

    def _check_criterion(self, mode: str, passes: int | None) -> None:
        if self.criterion is None:
            if self.criterion_options:
                raise UsageError(f"{self.name}: criterion_options without a criterion; name one.")
            return
        if mode != "per_batch" or passes is not None:
            raise UsageError(
                f"{self.name}: mode and passes are of the change by gradient, not of criterion {self.criterion}; leave"
                " them out, or the criterion."
            )
        check_options(self.criterion, self.criterion_options)
        if self.calibration_images < 1:
            raise UsageError(f"{self.name}: calibration_images={self.calibration_images}; at least 1.")
        if self.criterion in NEED_DATA and not self.calibration and self.data is None:
            raise UsageError(
                f"{self.name}: criterion {self.criterion} needs calibration batches, or data to draw them from; give"
                " them, or use l1, l2 or lamp."
            )

    def _begin(self, trainer: "Trainer") -> None:
        total = sum(stage.settings.epochs for stage in trainer.plan)
        self.epochs = self.epochs or max(1, round(0.6 * total))
        if self.epochs > total:
            raise UsageError(f"{self.name}: epochs={self.epochs}, but the training has {total}.")
        assert self._graph is not None
        scored = decided_by_main_rank(lambda: self._scored(trainer))
        self.sizes = {group.name: group.size for group in groups_of(self._graph, self.groups) if group.name in scored}
        if self.budget is not None:
            self.rate = self._rate_for(trainer, Budget.parse(self.budget))

    def _rate_for(self, trainer: "Trainer", budget: Budget) -> float:
        """Return the smallest rate (in steps of 1/256) whose final widths meet `budget`."""
        model, example, graph = trainer.state.model, one_image(trainer.state.example), self._graph
        assert graph is not None and self.epochs is not None
        limits, widths = budget.resolve(count(model, example)).limits, WidthCost(model, example, graph)
        for step in range(256):
            self.rate = step / 256
            selection = {n: torch.arange(self.allowed(size, self.epochs)) for n, size in self.sizes.items()}
            costs = {"macs": widths.macs, "parameters": widths.parameters, "size": widths.size}
            if any(limit.metric not in costs for limit in limits):
                raise UsageError(f"{self.name}: {budget} has a limit that is not counted; use macs, parameters, size.")
            if all(costs[limit.metric](selection) <= limit.value for limit in limits):
                return self.rate
        raise BudgetError(f"{self.name}: no share of every layer meets {budget}; use `prune`, which cuts further.")

    def _scored(self, trainer: "Trainer") -> list[str]:
        """Return the groups that will have scores."""
        if self.criterion is not None:
            return sorted(self._scores(trainer))
        assert self._graph is not None
        tensors = tensors_of(trainer.state.model)
        return sorted(
            sums_of_units(self._graph, {n: torch.zeros_like(tensors[n]) for n in made_by(self._graph, tensors)})
        )

    def _scores(self, trainer: "Trainer") -> dict[str, Tensor]:
        """Return what each unit is worth after this epoch."""
        model, graph = trainer.state.model, self._graph
        assert graph is not None
        if self.criterion is None:
            return self.changes
        if self.criterion in NEED_DATA and not self.calibration and self.data is not None:
            device = trainer.state.device
            self.calibration = draw_calibration(self.data, self.calibration_images, seed=self.seed, device=device)
        return score_units(
            self.criterion,
            model,
            graph,
            self.calibration or None,
            seed=self.seed + self.done,
            options=self.criterion_options,
        )

    def _norms(self, trainer: "Trainer") -> dict[str, Tensor]:
        assert self._graph is not None
        tensors = tensors_of(trainer.state.model)
        gradients = {n: tensors[n].grad for n in made_by(self._graph, tensors)}
        return sums_of_units(self._graph, {n: g.detach() for n, g in gradients.items() if g is not None})

    def _once_more(self, trainer: "Trainer") -> dict[str, Tensor]:
        """Return the L1 norms of the gradients summed over the training set at fixed weights, in eval mode."""
        state, model = trainer.state, trainer.state.model
        model.zero_grad(set_to_none=True)
        try:
            with in_eval(model):
                for number, batch in enumerate(trainer.stage.batches(max(0, state.clock.epoch - 1), 0)):
                    if self.passes is not None and number >= self.passes:
                        break
                    state.batch = batch
                    state.images, state.targets = trainer.transform(batch)
                    trainer.forward()
                    trainer.compute_losses()
                    state.loss.backward()  # type: ignore[union-attr]
                return self._norms(trainer)
        finally:
            model.zero_grad(set_to_none=True)

    def _cut(self, trainer: "Trainer") -> None:
        assert self._graph is not None and self.epochs is not None
        decision = decided_by_main_rank(lambda: self._choose(self._scores(trainer)))
        self.changes = {}
        self._reset(trainer, decision["reset"])
        kept = {name: torch.tensor(units) for name, units in decision["kept"].items()}
        if kept:
            trainer.edit_structure([self._graph.shrink(kept)])

    def _choose(self, worth: Mapping[str, Tensor]) -> dict[str, dict[str, list[int]]]:
        """Return which units stay, of every group that loses some, and which start again."""
        assert self._graph is not None and self.epochs is not None
        share = 1.0 if self.done >= self.epochs else self.remove
        scores = {name: change for name, change in worth.items() if name in self.sizes}
        kept, reset = {}, {}
        for ladder in build_ladders(scores, self._graph):
            weak = max(0, ladder.size - self.allowed(self.sizes[ladder.name], self.done))
            wanted = ladder.size - math.floor(share * weak)
            rung = min(i for i, width in enumerate(ladder.widths) if width >= wanted)
            if rung < len(ladder.widths) - 1:
                kept[ladder.name] = ladder.kept(rung).tolist()
            soft = ladder.order[ladder.size - weak : ladder.widths[rung]]
            if len(soft) and share < 1:
                reset[ladder.name] = soft.tolist()
        return {"kept": kept, "reset": reset}

    @torch.no_grad()
    def _reset(self, trainer: "Trainer", units: Mapping[str, list[int]]) -> None:
        """Set what makes these units, and what the optimisers remember of it, to zero."""
        tensors, graph = tensors_of(trainer.state.model), self._graph
        assert graph is not None
        for name, chosen in units.items():
            for member in graph[name].members:
                tensor = tensors[member.parameter]
                entries = member.index[torch.tensor(chosen)].flatten().to(tensor.device)
                if member.role == "producer":
                    tensor.index_fill_(member.dim, entries, 0)
                    clear_state(trainer.state.optimizers.values(), tensor, member.dim, entries)
                elif member.role == "affine" and member.parameter.endswith(".bias"):
                    lifted = tensor.index_select(member.dim, entries).clamp_min(_LIVELY)
                    tensor.index_copy_(member.dim, entries, lifted)
