"""Training sparse networks: masks that are held, or found along the way (see `convette.pruning.sparsity`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.pruning.sparsity import Masks, apply_masks, make_masks, masks_of, parse_pattern
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer


class KeepSparsity(Method):
    """Hold masks while training: what is zero stays zero, whatever optimiser, momentum and weight decay do.

    `masks` None: those that the zeros of the network say (`masks_of`). Masks follow edits of the structure. Costs a
    masked fill a step. Raises `UsageError` at the start for a network without zeros.
    """

    name = "keep_sparsity"
    order = 50
    events = frozenset({Event.SETUP, Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED})

    def __init__(self, masks: Masks | None = None) -> None:
        self.masks: dict[str, Tensor] = dict(masks or {})

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
                self.masks[name] = mask


class GradualSparsity(KeepSparsity):
    r"""Make weights sparse during the training, along the cubic curve of Zhu and Gupta, and hold the last masks.

    .. math:: \rho_j = \rho\, \bigl(1 - (1 - j / n)^3\bigr)

    after moment j of `times` = n, evenly spaced between the shares `begin` and `end` of the training; the masks are
    taken anew at each, so that a weight may come back until the last. ``pattern="N:M"`` goes from (M-1):M down to N:M,
    one a moment (`times` is then M - N). Other choices as `make_masks`. Source: Zhu and Gupta, To Prune, or Not to
    Prune, arXiv 1710.01878; N:M: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    name = "gradual_sparsity"
    events = frozenset({Event.BATCH_START, Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED})

    def __init__(
        self,
        sparsity: float | int = 0.9,
        *,
        pattern: str = "unstructured",
        scope: str = "global",
        exclude: Sequence[str] = (),
        begin: float = 0.1,
        end: float = 0.7,
        times: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= begin <= end <= 1 or times < 1:
            raise UsageError(
                f"gradual sparsity: begin={begin}, end={end}, times={times} is no schedule; 0<=begin<=end<=1."
            )
        if not 0 < sparsity < 1:
            raise UsageError(f"gradual sparsity: sparsity = {sparsity} must be between 0 and 1.")
        self.shape = parse_pattern(pattern)
        self.sparsity, self.scope, self.exclude = float(sparsity), scope, tuple(exclude)
        self.begin, self.end = begin, end
        self.times = self.shape[1] - self.shape[0] if self.shape else times
        self.done = 0

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Take new masks where some are due, hold them."""
        if event is not Event.BATCH_START:
            if self.masks:
                super().apply(event, trainer)
            return
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        due = sum(trainer.state.clock.step >= self._moment(number, total) for number in range(self.times))
        if due > self.done:
            self.done = due
            self.masks = self._masks(trainer.state.model)
            apply_masks(trainer.state.model, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and how far the schedule is."""
        return {**super().state_dict(), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state)
        self.done = int(state["done"])

    def _moment(self, number: int, total: int) -> int:
        share = self.begin + (self.end - self.begin) * number / max(1, self.times - 1)
        return min(round(share * total), total - 1)

    def _masks(self, model: nn.Module) -> dict[str, Tensor]:
        if self.shape is not None:
            n, m = self.shape
            return make_masks(model, pattern=f"{max(n, m - self.done)}:{m}", exclude=self.exclude)
        share = 1 - (1 - self.done / self.times) ** 3
        return make_masks(model, self.sparsity * share, scope=self.scope, exclude=self.exclude)
