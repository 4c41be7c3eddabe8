"""Training of binary networks: latent weights without decay, kept within [-1, 1] (arXiv 1603.05279, 1808.00278)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.quantization.binary_networks import BinaryConv2d, BinaryLinear
from convette.training.events import Event, Method
from convette.training.methods._groups import split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class LatentWeights(Method):
    r"""Take weight decay off the latent weights of binary layers and clamp them to [-1, 1] after every step.

    Decay pulls latent weights to zero, where signs flicker; beyond one they get no gradient and stay. Layers of
    `convette.layers.quantization.BinaryConv2d` bring this method along, with its defaults.

    - `centre`: also subtract each latent filter's mean over its input channels, as XNOR-Net's code does.
    - `least_gamma`: scales of batch norms do not fall below this (0.01 in XNOR-Net's NIN: a norm in front of a sign
      whose scale changes its sign turns every activation around). None: they are free.
    - `real_share`: the two-step recipe in one training: for this share of its steps only activations are signs and
      weights are real; then weights are rounded as well, from where they are. 0: both from the start. Evaluations judge
      the rounded network throughout.

    Raises `UsageError` for a share outside [0, 1). Costs one pass over the latent weights a step.
    """

    def __init__(
        self,
        centre: bool = False,
        least_gamma: float | int | None = None,
        real_share: float | int = 0.0,
        *,
        name: str = "latent_weights",
    ) -> None:
        if not 0 <= real_share < 1:
            raise UsageError(f"latent weights: real_share = {real_share}: a share from 0 to below 1 is needed.")
        self.name, self.centre, self.least_gamma, self.real_share = name, centre, least_gamma, real_share
        self.events = frozenset(
            {
                Event.STAGE_START,
                Event.STRUCTURE_CHANGED,
                Event.BATCH_START,
                Event.AFTER_OPTIMIZER_STEP,
                Event.STAGE_END,
            }
        )

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Split the group off, choose real or rounded weights, or clamp."""
        state = trainer.state
        layers = [layer for layer in state.model.modules() if isinstance(layer, BinaryConv2d | BinaryLinear)]
        if event is Event.AFTER_OPTIMIZER_STEP:
            self._clamp(state.model, layers)
        elif event in (Event.BATCH_START, Event.STAGE_END):
            total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
            real = event is Event.BATCH_START and state.clock.step < round(self.real_share * total)
            for layer in layers:
                layer.real_weights = real
        elif "main" in state.optimizers:
            split_group(state.optimizers["main"], [layer.weight for layer in layers], self.name)

    @torch.no_grad()
    def _clamp(self, model: nn.Module, layers: list[BinaryConv2d | BinaryLinear]) -> None:
        for layer in layers:
            if self.centre:
                layer.weight.sub_(layer.weight.mean(1, keepdim=True))
            layer.weight.clamp_(-1, 1)
        if self.least_gamma is not None:
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.affine:
                    norm.weight.clamp_(min=float(self.least_gamma))
