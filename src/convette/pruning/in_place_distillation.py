"""In-place distillation: the unpruned network goes on learning and teaches the pruned one at every step."""

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from convette.errors import UsageError
from convette.training import Event, Method, distillation_loss

if TYPE_CHECKING:
    from convette.training import Trainer


class InPlaceDistillation(Method):
    r"""Train `teacher` on the labels beside the network, and the network on what the teacher says at that step.

    .. math:: L = (1 - w)\, L_{task}(z_s) + w\, T^2\, \mathrm{KL}(p_t \,\|\, p_s) + L_{task}(z_t)

    No gradient goes from the second term to the teacher; both see the same augmented images, one optimiser trains both,
    and the teacher is thrown away at the end. Costs the teacher's training: the step of a slimmable network's widest
    width (Yu and Huang, Universally Slimmable Networks, arXiv 1903.05134), here with weights of its own. Raises
    `UsageError` for a temperature or weight out of range.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float | int = 4.0,
        weight: float | int = 0.9,
        *,
        name: str = "in_place_distillation",
    ) -> None:
        if not temperature > 0 or not 0 <= weight <= 1:
            raise UsageError(
                f"{name}: temperature = {temperature!r} must be above 0 and weight = {weight!r} in [0, 1]."
            )
        self.name, self.teacher = name, teacher
        self.temperature, self.weight = float(temperature), float(weight)
        self.events = frozenset({Event.SETUP, Event.AFTER_LOSS})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Let the optimiser know the teacher; add the two terms."""
        state = trainer.state
        if event is Event.SETUP:
            trainer.add_auxiliary(self.name, self.teacher)
            return
        teacher = state.auxiliary[self.name].train()
        with trainer.fabric.autocast():
            logits = teacher(state.images)
        state.losses.weights["task"] = 1.0 - self.weight
        taught = distillation_loss(state.outputs, logits.detach(), self.temperature)
        state.losses.add(self.name, taught, self.weight)
        state.losses.add(f"{self.name}:teacher", functional.cross_entropy(logits.float(), state.targets))
