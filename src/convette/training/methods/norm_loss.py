"""Training with norm loss instead of weight decay (arXiv 2103.06583)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from convette.errors import UsageError
from convette.layers.normalization.norm_loss import NormLoss
from convette.training.events import Event, Method
from convette.training.methods._groups import split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class NormLossTraining(Method):
    """Pull all filters to norm 1: as the loss term ``"norm_loss"``, or as a step of its own (``mode="decoupled"``).

    Weight decay of the weights it acts on is switched off. `weight` None: 1e-2 as a loss, 1e-4 decoupled; `exclude`
    names modules to leave out. See `convette.layers.normalization.NormLoss`.
    """

    def __init__(
        self,
        weight: float | None = None,
        mode: Literal["loss", "decoupled"] = "loss",
        exclude: Sequence[str] = (),
        *,
        name: str = "norm_loss",
    ) -> None:
        if mode not in ("loss", "decoupled"):
            raise UsageError(f"{name}: mode {mode!r} is none of 'loss', 'decoupled'.")
        self.name, self.mode, self.exclude = name, mode, tuple(exclude)
        self.weight = weight if weight is not None else (1e-2 if mode == "loss" else 1e-4)
        acting = Event.AFTER_LOSS if mode == "loss" else Event.BEFORE_OPTIMIZER_STEP
        self.events = frozenset({Event.SETUP, Event.STAGE_START, Event.STRUCTURE_CHANGED, acting})
        self._loss: NormLoss | None = None

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Look the layers up, switch weight decay off, add the term or make the step."""
        state = trainer.state
        if event is Event.SETUP or event is Event.STRUCTURE_CHANGED or self._loss is None:
            self._loss = NormLoss(state.model, 1.0 if self.mode == "loss" else self.weight, self.exclude)
        if event is Event.STAGE_START:
            weights = [parameter for layer in self._loss.layers.values() for parameter in [layer.weight]]
            split_group(state.optimizers["main"], weights, self.name)  # type: ignore[arg-type]
        elif event is Event.AFTER_LOSS:
            state.losses.add(self.name, self._loss(), self.weight)
        elif event is Event.BEFORE_OPTIMIZER_STEP:
            self._loss.step(state.learning_rate)
