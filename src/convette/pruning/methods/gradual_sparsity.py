"""Becoming sparse while training: ever more of the smallest weights go, unstructured or N of every M."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.pruning.methods.keep_sparsity import KeepSparsity
from convette.pruning.sparsity import apply_masks, make_masks
from convette.training import Event

if TYPE_CHECKING:
    from convette.training import Trainer


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
        begin: float | int = 0.1,
        end: float | int = 0.7,
        times: int = 8,
    ) -> None:
        super().__init__(pattern=pattern)
        if not 0 <= begin <= end <= 1 or times < 1:
            raise UsageError(
                f"gradual sparsity: begin={begin}, end={end}, times={times} is no schedule; 0<=begin<=end<=1."
            )
        if scope not in ("global", "layer"):
            raise UsageError(f"gradual sparsity: scope {scope!r} is none of 'global', 'layer'.")
        if not 0 < sparsity < 1:
            raise UsageError(f"gradual sparsity: sparsity = {sparsity} must be between 0 and 1.")
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

    def _in_pattern(self, mask: Tensor, weight: Tensor) -> Tensor:
        # Before the last moment the pattern is looser, and is taken anew anyway.
        return super()._in_pattern(mask, weight) if self.done >= self.times else mask
