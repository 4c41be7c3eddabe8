"""Training with sparse switchable normalization: the radius grows, ratios learn slowly, then freeze."""

from typing import TYPE_CHECKING

from torch import nn

from convette.errors import UsageError
from convette.layers.normalization.sparse_switchable_normalization import (
    RadiusSchedule,
    ratio_parameters,
    switch_layers,
)
from convette.training.events import Event, Method
from convette.training.methods._groups import scale_rate, split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class SparseSwitch(Method):
    """Raise the radius of all `SparseSwitchNorm2d` linearly from 0 to 1 over the run, until every layer has picked.

    Ratios learn at `rate` times the learning rate, without weight decay, their gradients clipped to the norm `clip`
    together. The radius is a function of the step, so a resumed run goes on where it was. At the end ties are broken
    (`SparseSwitchNorm2d.decide`), in the averaged copy too. `collapse` the network afterwards. Raises `UsageError` for
    a network without such layers. Source: arXiv 1903.03793.
    """

    def __init__(self, rate: float = 0.1, clip: float = 1.0, *, name: str = "sparse_switch") -> None:
        if not rate >= 0 or not clip > 0:
            raise UsageError(f"{name}: rate = {rate!r} must be 0 or more and clip = {clip!r} above 0.")
        self.name, self.rate, self.clip = name, rate, clip
        self.events = frozenset(
            {Event.SETUP, Event.STAGE_START, Event.BATCH_START, Event.GRADIENTS_READY, Event.FIT_END}
        )

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Set the group up, move the radius, clip, decide."""
        state = trainer.state
        if event is Event.SETUP:
            if not switch_layers(state.model):
                raise UsageError(f"{self.name}: the network has no SparseSwitchNorm2d; convert its norms first.")
        elif event is Event.STAGE_START:
            split_group(state.optimizers["main"], ratio_parameters(state.model), self.name)
        elif event is Event.BATCH_START:
            total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
            RadiusSchedule(total)(state.model, state.clock.step)
            scale_rate(state.optimizers["main"], self.name, self.rate)
        elif event is Event.GRADIENTS_READY:
            nn.utils.clip_grad_norm_(ratio_parameters(state.model), self.clip)
        else:
            for model in (state.model, *([state.ema.module] if state.ema is not None else [])):
                for layer in switch_layers(model).values():
                    layer.decide()
