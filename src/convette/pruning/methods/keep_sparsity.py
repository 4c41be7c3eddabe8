"""Training sparse networks: masks that are held (see `convette.pruning.sparsity`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.pruning.sparsity import Masks, apply_masks, masks_of, n_m_mask, parse_pattern
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer


class KeepSparsity(Method):
    """Hold masks while training: what is zero stays zero, whatever optimiser, momentum and weight decay do.

    `masks` None: those that the zeros of the network say (`masks_of`). Masks follow edits of the structure; those of a
    `pattern` "N:M" are completed by size where a cut gave weights other neighbours. Costs a masked fill a step. Raises
    `UsageError` at the start for a network without zeros.
    """

    name = "keep_sparsity"
    order = 50
    events = frozenset({Event.SETUP, Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED})

    def __init__(self, masks: Masks | None = None, *, pattern: str = "unstructured") -> None:
        self.masks: dict[str, Tensor] = dict(masks or {})
        self.shape = parse_pattern(pattern)

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Take the masks up, hold them, follow edits."""
        model = trainer.state.model
        if event is Event.STRUCTURE_CHANGED:
            self._follow(trainer)
            return
        if event is Event.SETUP and not self.masks:
            self.masks = self._at_first(model)
        apply_masks(model, self.masks)
        if trainer.state.ema is not None:
            apply_masks(trainer.state.ema.module, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.masks = dict(state["masks"])

    def _at_first(self, model: nn.Module) -> dict[str, Tensor]:
        masks = masks_of(model)
        if not masks:
            raise UsageError(f"{self.name}: no weight of this network is zero; give masks, or sparsify it first.")
        return masks

    def _follow(self, trainer: "Trainer") -> None:
        for name, change in trainer.state.change.parameters.items():
            if name not in self.masks:
                continue
            mask = self.masks.pop(name)
            if change.new is None:
                continue
            for dim, kept in change.kept.items():
                if int(kept.min()) < 0:
                    mask = None
                    break
                mask = mask.index_select(dim, kept.to(mask.device))
            if mask is not None and mask.shape == change.new.shape:
                self.masks[name] = self._in_pattern(mask, change.new)

    def _in_pattern(self, mask: Tensor, weight: Tensor) -> Tensor:
        if self.shape is None:
            return mask
        # What was masked is zero, so it is taken last.
        return n_m_mask(weight.detach().abs().masked_fill(~mask.to(weight.device), 0.0), *self.shape)
