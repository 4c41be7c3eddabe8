"""Soft pruning: units are set to zero again and again, and may come back until the cut."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convette.cost import Budget
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._units import tensors_of
from convette.pruning.methods.gradual_pruning import GradualPruning, one_image
from convette.pruning.methods.growing_regularization import dropped_entries
from convette.surgery import trace

if TYPE_CHECKING:
    from convette.training import Trainer


class SoftPruning(GradualPruning):
    r"""Zero the weights that make the worst units, `times` times during the training; train on; cut at the last time.

    At each of the moments the units are scored anew, those which the budget does not allow are masked,

    .. math:: W_u \leftarrow 0 \quad (u \notin K_j)

    and all weights go on learning: a unit whose weights have grown again by the next moment is kept then. Between the
    shares `begin` and `end` of the training the masks follow the budgets of `GradualPruning` (so more are masked from
    time to time); the last is final and is cut for real. Batch norms are left alone, so that gradients reach what is
    zero.

    Args as `GradualPruning`. Costs a trace and a scoring at each moment; steps get cheaper only after the cut. Source:
    He et al., Soft Filter Pruning, arXiv 1808.06866, and its asymptotic form, arXiv 1808.07471.
    """

    name = "soft_pruning"

    def __init__(
        self,
        budget: Budget | str,
        *,
        criterion: str = "l1",
        criterion_options: Mapping[str, Any] | None = None,
        allocation: str = "global",
        allocation_options: Mapping[str, Any] | None = None,
        begin: float | int = 0.05,
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
        super().__init__(
            budget,
            criterion=criterion,
            criterion_options=criterion_options,
            allocation=allocation,
            allocation_options=allocation_options,
            begin=begin,
            end=end,
            times=times,
            multiple_of=multiple_of,
            min_fraction=min_fraction,
            constraints=constraints,
            calibration_images=calibration_images,
            calibration=calibration,
            data=data,
            seed=seed,
        )
        if times < 2:
            raise UsageError(f"soft pruning: times={times}; at least 2, one to mask and one to cut.")

    def _cut(self, trainer: "Trainer") -> None:
        graph = trace(trainer.state.model, one_image(trainer.state.example))
        chosen = decided_by_main_rank(lambda: self.choose(trainer, graph))
        if self.cuts >= self.times:
            if chosen:
                trainer.edit_structure([graph.shrink({name: torch.tensor(kept) for name, kept in chosen.items()})])
            return
        tensors = tensors_of(trainer.state.model)
        with torch.no_grad():
            for name, dim, entries in dropped_entries(graph, chosen, ("producer",)):
                tensors[name].index_fill_(dim, entries.to(tensors[name].device), 0.0)
