"""Training consistent normalization: slow scalars, and clean images beside the augmented ones (arXiv 1909.00182)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convette.errors import UsageError
from convette.layers.normalization.consistent_normalization import ConsistentBatchNorm2d, unit_scalars
from convette.training.events import Event, Method
from convette.training.methods._groups import scale_rate, split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class ConsistentTraining(Method):
    """Train a network of `to_consistent`: its scalars at a tenth of the rate and without weight decay.

    Where its normalisers take clean statistics (``stats="clean"``), every step also runs the images as they are, in
    front of the augmented ones; the loss is of the augmented half. That costs a second forward pass, and needs
    `preprocessing` (``data.preprocessing``), which makes clean images of a batch's bytes. Raises `UsageError` where it
    is missing.
    """

    conflicts = ("distillation",)

    def __init__(
        self,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        rate: float = 0.1,
        *,
        name: str = "consistent_normalization",
    ) -> None:
        self.name, self.rate, self.preprocessing = name, rate, preprocessing
        self.events = frozenset(
            {Event.SETUP, Event.STAGE_START, Event.BATCH_START, Event.AFTER_TRANSFORM, Event.AFTER_FORWARD}
        )
        self._clean = False

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Set the group up, put clean images in front, take their outputs away."""
        state = trainer.state
        if event is Event.SETUP:
            norms = [module for module in state.model.modules() if isinstance(module, ConsistentBatchNorm2d)]
            self._clean = any(norm.two_streams for norm in norms)
            if self._clean and self.preprocessing is None:
                raise UsageError(f"{self.name}: clean statistics need preprocessing=data.preprocessing.")
        elif event is Event.STAGE_START:
            split_group(state.optimizers["main"], unit_scalars(state.model), self.name)
        elif event is Event.BATCH_START:
            scale_rate(state.optimizers["main"], self.name, self.rate)
        elif self._clean and event is Event.AFTER_TRANSFORM:
            assert self.preprocessing is not None
            clean = self.preprocessing(state.batch.images.to(state.device)).to(state.images.dtype)
            state.images = torch.cat([clean, state.images])
        elif self._clean and event is Event.AFTER_FORWARD:
            state.outputs = state.outputs[len(state.outputs) // 2 :]
