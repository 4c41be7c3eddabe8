"""What a pruning run gives back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from convette.cost import Cost
from convette.surgery import card_of, set_card


@dataclass(frozen=True)
class StepRecord:
    """Where the network stood after a step; step 0 is the start.

    `cost` is counted, not predicted (its latency is filled only where it was measured). Accuracies are shares on the
    validation split, None without data; `accuracy_before_recovery` is after the cut and the recalibration of batch
    norm. `units`: removable units left. `seconds`: of this step, measuring included. `blocks`: left out at this step.
    """

    step: int
    cost: Cost
    units: int
    epochs: int = 0
    accuracy_before_recovery: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    blocks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them back."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return {**values, "cost": self.cost.to_json(), "blocks": list(self.blocks)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "StepRecord":
        """Read back what `to_json` wrote."""
        blocks = tuple(value.get("blocks", ()))
        return StepRecord(**{**value, "cost": Cost.from_json(value["cost"]), "blocks": blocks})


@dataclass(frozen=True)
class PruneResult:
    """The pruned network and how it came about.

    - `model`: a new network; the one given to `prune` is as it was.
    - `start`, `end`: costs; latencies of both, where the budget asks for them, are from one interleaved measurement at
      the end.
    - `statuses`: one a limit (`convette.cost.LimitStatus`): its absolute bound, the value reached, met or not.
    - `steps`: the way from start to end, step 0 first.
    - `widths`: output channels before and after of every layer that has some, by module name.
    - `recovery`: the epochs of training, in order. `seconds`: of the whole run, earlier sittings included.
    """

    model: nn.Module
    start: Cost
    end: Cost
    statuses: tuple[Any, ...]
    steps: tuple[StepRecord, ...]
    widths: Mapping[str, tuple[int, int]]
    recovery: tuple[Any, ...] = ()
    seconds: float = 0.0

    @property
    def removed(self) -> dict[str, tuple[int, int]]:
        """The layers that became narrower: channels before and after, by module name."""
        return {layer: width for layer, width in self.widths.items() if width[0] != width[1]}

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that were left out, by module name."""
        return tuple(name for step in self.steps for name in step.blocks)

    @property
    def met(self) -> bool:
        """Whether every limit of the budget is met."""
        return all(status.met for status in self.statuses)


def widths_of(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the output channels of every convolution and linear layer before and after, by module name.

    0 after: the layer was left out. The names are those of `before`, also where un-tying put a layer into another.
    """
    now: dict[str, int] = {}
    for name, module in after.named_modules():
        if (width := _width(module)) is not None:
            now.setdefault(_plain(name), width)
    then = {name: width for name, module in before.named_modules() if (width := _width(module)) is not None}
    return {name: (width, now.get(_plain(name), 0)) for name, width in then.items()}


def _plain(name: str) -> str:
    # What gathers and scatters of an un-tied stream hold is called "layer" there.
    return ".".join(part for part in name.split(".") if part != "layer")


def _width(module: nn.Module | None) -> int | None:
    for attribute in ("out_channels", "out_features"):
        if isinstance(width := getattr(module, attribute, None), int) and isinstance(
            getattr(module, "weight", None), nn.Parameter
        ):
            return width
    return None


def write_history(model: nn.Module, result: PruneResult, budget: str, settings: Any) -> None:
    """Append this run to the history on the model's card: settings, costs and accuracies, as JSON values."""
    figures = ("macs", "parameters", "size")
    entry = {
        "step": "prune",
        "budget": budget,
        "settings": asdict(settings),
        "start": {name: getattr(result.start, name) for name in figures},
        "end": {name: getattr(result.end, name) for name in figures},
        "accuracy_before": result.steps[0].accuracy,
        "accuracy": result.steps[-1].accuracy,
        "seconds": round(result.seconds, 1),
    }
    card = card_of(model)
    set_card(model, replace(card, history=(*card.history, entry)))
