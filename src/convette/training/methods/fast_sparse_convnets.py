"""Gradual magnitude pruning of 1x1 convolutions to unstructured zeros, for the sparse engine (arXiv 1911.09723)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.training.events import Event, Method

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


def cubic_sparsity(progress: float | int, final: float | int, start: float | int, end: float | int) -> float:
    r"""Return the share of zeros at `progress` (0..1) of a training.

    .. math:: s = s_f \bigl(1 - (1 - (t - t_0)/(t_1 - t_0))^3\bigr)

    0 up to `start`, `final` from `end` on; half way between them 87.5 % of it.
    """
    if progress <= start:
        return 0.0
    share = min(1.0, (progress - start) / (end - start))
    return float(final * (1 - (1 - share) ** 3))


def magnitude_mask(weight: Tensor, sparsity: float | int, block: int = 1) -> Tensor:
    """Return which weights stay (bool, like `weight`): all but the smallest share `sparsity`, exactly.

    With `block` 2 or 4 the blocks of so many filters at one input channel stay or go together, by their L1 norm;
    filters left over go one by one.
    """
    if block not in (1, 2, 4):
        raise UsageError(f"block = {block}: 1, 2 and 4 can be.")
    scores = weight.detach().abs().flatten(1)
    whole = len(scores) // block * block
    grouped = scores[:whole].reshape(-1, block, scores.shape[1]).mean(1).repeat_interleave(block, 0)
    scores = torch.cat([grouped, scores[whole:]])
    dropped = round(float(sparsity) * scores.numel())
    if block > 1:
        dropped -= dropped % block
    order = torch.argsort(scores.flatten(), stable=True) if block == 1 else _by_block(scores, whole, block)
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=weight.device)
    mask[order[:dropped]] = False
    return mask.reshape(weight.shape)


def _by_block(scores: Tensor, whole: int, block: int) -> Tensor:
    # Members of a block stand one behind the other, so that a cut goes between blocks.
    rows, columns = scores.shape
    number = torch.arange(rows * columns, device=scores.device).reshape(rows, columns)
    blocks = number[:whole].reshape(-1, block, columns).transpose(1, 2).reshape(-1, block)
    ranked = blocks[torch.argsort(scores.flatten()[blocks[:, 0]], stable=True)].flatten()
    left = number[whole:].flatten()
    return torch.cat([ranked, left[torch.argsort(scores.flatten()[left], stable=True)]])


class SparseTraining(Method):
    """Set ever more of the smallest weights of all 1x1 convolutions to zero while training (a cubic schedule).

    Every layer ends with the share `sparsity` of zeros, exactly; masks are made anew every `every` steps from `start`
    to `end` (shares of the training) by magnitude, in blocks of `block` filters, and are fixed from then on. Masked
    weights are zero after every step; they get gradients, so that they may come back while masks still move. Layers
    with fewer than `least` weights stay dense. Depthwise convolutions, stem and classifier are left alone: they have
    few weights. Run the network on ``sparse:cpu``. Raises `UsageError` for values that cannot be.
    """

    def __init__(
        self,
        sparsity: float | int = 0.9,
        block: int = 1,
        start: float | int = 0.05,
        end: float | int = 0.65,
        every: int = 10,
        least: int = 256,
        *,
        name: str = "fast_sparse_convnets",
    ) -> None:
        if not 0 < sparsity < 1 or not 0 <= start < end <= 1 or block not in (1, 2, 4) or every < 1:
            raise UsageError(f"{name}: sparsity in (0, 1), 0 <= start < end <= 1, block 1, 2 or 4, every 1 or more.")
        self.name, self.sparsity, self.block = name, sparsity, block
        self.start, self.end, self.every, self.least = start, end, every, least
        self.events = frozenset({Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED, Event.STAGE_START})
        self.masks: dict[str, Tensor] = {}

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Make masks when it is time, and apply them."""
        if event is not Event.AFTER_OPTIMIZER_STEP:
            self.masks = {name: mask for name, mask in self.masks.items() if self._fits(trainer, name, mask)}
            return
        clock = trainer.state.clock
        total = trainer.stage.steps * trainer.stage.settings.epochs
        now = (clock.stage_step + 1) / total
        due = clock.stage_step % self.every == 0 or not self.masks
        ending = now >= self.end > clock.stage_step / total
        if (self.start < now < self.end and due) or ending:
            sparsity = cubic_sparsity(now, self.sparsity, self.start, self.end)
            self.masks = {
                name: magnitude_mask(layer.weight, sparsity, self.block)
                for name, layer in sparse_layers(trainer.state.model, self.least).items()
            }
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight: Any = trainer.state.model.get_submodule(name).weight
                weight.mul_(mask)
        if self.masks and trainer.state.ema is not None and now >= self.end:
            # The averaged network must have the zeros too.
            with torch.no_grad():
                for name, mask in self.masks.items():
                    averaged: Any = trainer.state.ema.module.get_submodule(name).weight
                    averaged.mul_(mask)

    def _fits(self, trainer: "Trainer", name: str, mask: Tensor) -> bool:
        layer: Any = dict(trainer.state.model.named_modules()).get(name)
        return layer is not None and layer.weight.shape == mask.shape

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the masks back."""
        self.masks = dict(state["masks"])


def sparse_layers(model: nn.Module, least: int = 256) -> dict[str, nn.Conv2d]:
    """Return the 1x1 convolutions of `model` (stride 1, one group) with at least `least` weights, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.groups == 1
        and layer.weight.numel() >= least
    }
