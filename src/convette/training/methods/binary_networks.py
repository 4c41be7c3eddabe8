"""Training of binary networks: latent weights without decay, kept within [-1, 1] (arXiv 1603.05279, 1808.00278)."""

from typing import TYPE_CHECKING

import torch

from convette.layers.quantization.binary_networks import BinaryConv2d, BinaryLinear
from convette.training.events import Event, Method
from convette.training.methods._groups import split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class LatentWeights(Method):
    """Take weight decay off the latent weights of binary layers and clamp them to [-1, 1] after every step.

    Decay pulls latent weights to zero, where signs flicker; beyond one they get no gradient and stay. `centre`: also
    subtract each latent filter's mean over its input channels before a step, as XNOR-Net's code does. Layers of
    `convette.layers.quantization.BinaryConv2d` bring this method along.
    """

    def __init__(self, centre: bool = False, *, name: str = "latent_weights") -> None:
        self.name, self.centre = name, centre
        self.events = frozenset({Event.STAGE_START, Event.STRUCTURE_CHANGED, Event.AFTER_OPTIMIZER_STEP})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Split the group off, or clamp."""
        state = trainer.state
        weights = [layer.weight for layer in state.model.modules() if isinstance(layer, BinaryConv2d | BinaryLinear)]
        if event is not Event.AFTER_OPTIMIZER_STEP:
            if "main" in state.optimizers:
                split_group(state.optimizers["main"], weights, self.name)
            return
        with torch.no_grad():
            for weight in weights:
                if self.centre:
                    weight.sub_(weight.mean(1, keepdim=True))
                weight.clamp_(-1, 1)
