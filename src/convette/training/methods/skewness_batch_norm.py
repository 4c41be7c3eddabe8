"""Training with skewness-reduced batch norm that ends as batch norm: its exponents go to 1."""

from typing import TYPE_CHECKING

from convette.errors import UsageError
from convette.layers.normalization.skewness_batch_norm import anneal_to_bn
from convette.training.events import Event, Method

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class AnnealSkewness(Method):
    """Move the exponents of all `SkewReducedBatchNorm2d` linearly to 1, from the part `start` of the run to `end`.

    Afterwards the network is one of plain batch norm and folds whole. Between `end` and the end of the run it trains
    as such. A resumed run goes on where it was.
    """

    def __init__(self, start: float = 0.5, end: float = 0.9, *, name: str = "anneal_skewness") -> None:
        if not 0 <= start < end <= 1:
            raise UsageError(f"{name}: start = {start!r} and end = {end!r} must be 0 <= start < end <= 1.")
        self.name, self.start, self.end = name, start, end
        self.events = frozenset({Event.BATCH_START, Event.FIT_END})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Set the exponents for this step."""
        state = trainer.state
        if event is Event.FIT_END:
            for model in (state.model, *([state.ema.module] if state.ema is not None else [])):
                anneal_to_bn(model, 1.0)
            return
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        part = (state.clock.step / total - self.start) / (self.end - self.start)
        anneal_to_bn(state.model, min(1.0, max(0.0, part)))
