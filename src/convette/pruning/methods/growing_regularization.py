"""Growing regularisation: units that are to go are shrunk harder and harder before they are cut."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.cost import Budget
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._units import tensors_of
from convette.pruning.methods.gradual_pruning import GradualPruning, one_image
from convette.surgery import ChannelGraph, trace
from convette.training import Event

if TYPE_CHECKING:
    from convette.training import Trainer


class GrowingRegularization(GradualPruning):
    r"""Choose once what goes, push it towards zero with a growing strength, cut it when it hardly matters any more.

    .. math:: w_{t+1} = (1 - \rho_t)\, w_t, \qquad \rho_t = \min\{0.9,\; 2 \ln(1/\epsilon)\, (t - t_0) / (t_1 - t_0)^2\}

    after every optimiser step between the shares `begin` and `end` of the training, on all weights that make the units
    which `criterion` and `allocation` give up at `begin`, and on their batch-norm scales and shifts. Undisturbed they
    end at :math:`\epsilon` = `floor` of what they were; the others learn to do without them in the meantime. At `end`
    the units are cut; what is left of the training recovers. The decay is decoupled from the learning rate, as AdamW's.

    Args as `GradualPruning` (`times` aside). Costs one trace and one scoring, and a multiplication of the weights
    concerned a step. Raises what it raises. Source: Wang, Qin, Zhang and Fu, Neural Pruning via Growing Regularization,
    arXiv 2012.09243, with their additive step turned into a relative one.
    """

    name = "growing_regularization"
    events = frozenset({Event.BATCH_START, Event.AFTER_OPTIMIZER_STEP})

    def __init__(
        self,
        budget: Budget | str,
        *,
        criterion: str = "l1",
        criterion_options: Mapping[str, Any] | None = None,
        allocation: str = "global",
        allocation_options: Mapping[str, Any] | None = None,
        begin: float | int = 0.05,
        end: float | int = 0.6,
        floor: float | int = 1e-3,
        multiple_of: int = 1,
        min_fraction: float | int = 0.1,
        constraints: str = "",
        calibration_images: int = 256,
        calibration: Iterable[tuple[Tensor, Tensor]] = (),
        data: ImageData | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            budget,
            criterion=criterion,
            criterion_options=criterion_options,
            allocation=allocation,
            allocation_options=allocation_options,
            begin=begin,
            end=end,
            times=1,
            multiple_of=multiple_of,
            min_fraction=min_fraction,
            constraints=constraints,
            calibration_images=calibration_images,
            calibration=calibration,
            data=data,
            seed=seed,
        )
        if not 0 < floor < 1 or not begin < end:
            raise UsageError(
                f"growing regularisation: floor={floor} must be in (0, 1) and begin={begin} below end={end}."
            )
        self.floor = float(floor)
        self.selection: dict[str, list[int]] | None = None
        self._pushed: list[tuple[str, int, Tensor]] = []

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Choose at `begin`, push after each step, cut at `end`."""
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        first, last = round(self.begin * total), min(round(self.end * total), total - 1)
        step = trainer.state.clock.step
        if event is Event.BATCH_START:
            if self.selection is None and step >= first:
                self.cuts = 1
                graph = trace(trainer.state.model, one_image(trainer.state.example))
                self.selection = decided_by_main_rank(lambda: self.choose(trainer, graph))
                self._pushed = []
            elif self.cuts == 1 and step >= last and self.selection is not None:
                self.cuts = 2
                self._finish(trainer)
        elif self.cuts == 1 and self.selection and step < last:
            self._push(trainer, (step + 1 - first) / max(1, last - first), max(1, last - first))

    def state_dict(self) -> dict[str, Any]:
        """Return the choice as well."""
        return {**super().state_dict(), "selection": self.selection}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state)
        chosen = state["selection"]
        self.selection = None if chosen is None else {name: [int(u) for u in kept] for name, kept in chosen.items()}
        self._pushed = []

    def _finish(self, trainer: "Trainer") -> None:
        assert self.selection is not None
        kept = {name: torch.tensor(units) for name, units in self.selection.items()}
        if kept:
            graph = trace(trainer.state.model, one_image(trainer.state.example))
            trainer.edit_structure([graph.shrink(kept)])

    @torch.no_grad()
    def _push(self, trainer: "Trainer", share: float, steps: int) -> None:
        model = trainer.state.model
        if not self._pushed and self.selection is not None:
            graph = trace(model, one_image(trainer.state.example))
            self._pushed = dropped_entries(graph, self.selection)
        rate = min(0.9, 2 * math.log(1 / self.floor) * share / steps)
        tensors = tensors_of(model)
        for name, dim, entries in self._pushed:
            tensor = tensors[name]
            if not isinstance(tensor, nn.Parameter):
                continue
            factor = torch.ones(tensor.shape[dim], device=tensor.device, dtype=tensor.dtype)
            factor[entries.to(tensor.device)] = 1 - rate
            tensor.mul_(factor.view([-1 if d == dim else 1 for d in range(tensor.ndim)]))


def dropped_entries(
    graph: ChannelGraph, selection: Mapping[str, list[int]], roles: tuple[str, ...] = ("producer", "affine")
) -> list[tuple[str, int, Tensor]]:
    """Return what the units that `selection` drops own: (parameter, dimension, entries), of members in `roles`."""
    found = []
    for name, kept in selection.items():
        group = graph[name]
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[torch.tensor(kept, dtype=torch.int64)] = False
        found += [(m.parameter, m.dim, m.index[gone].flatten()) for m in group.members if m.role in roles]
    return found
