"""What a run knows about itself while it runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from convette.training.ema import Ema
from convette.training.settings import TrainSettings
from convette.training.taps import FeatureTaps


@runtime_checkable
class BatchLike(Protocol):
    """One batch as `convette.data` gives it: bytes, labels, and where in the split they come from."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass
class Clock:
    """Where a run is. Everything that depends on time is a function of this."""

    stage: int = 0
    epoch: int = 0  # epochs done in this stage
    epoch_step: int = 0  # optimiser steps done in this epoch
    stage_step: int = 0  # optimiser steps done in this stage
    step: int = 0  # optimiser steps done in the run
    seconds: float = 0.0  # spent training, all sittings together


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own settings, data and length; it starts with a fresh optimiser and schedule.

    `batches(epoch, skip)` yields this rank's batches of an epoch, without the first `skip`; `steps` is the number of
    optimiser steps an epoch (each takes ``settings.accumulate`` batches); `images_per_step` counts all ranks.
    `validate(model)` returns figures (``"loss"``, ``"accuracy"``) of the validation split, the same on all ranks; None:
    there is nothing to validate on.
    """

    name: str
    settings: TrainSettings
    steps: int
    images_per_step: int
    batches: Callable[[int, int], Iterator[Any]]
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to. Losses are means over its steps; rates are of its last step."""

    stage: str
    epoch: int  # 1 is the first
    step: int
    seconds: float
    images_per_second: float
    learning_rate: float
    train_loss: float
    terms: dict[str, float]  # the loss terms by name, unweighted
    train_accuracy: float | None = None  # of the batches as trained on: augmented, while the network still changed
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self)


@dataclass
class LossTerms:
    """The parts of the loss by name; the loss is their weighted sum.

    Weights are set anew for each forward pass, so that a method says ``terms.weights["task"] = 0.1`` where it adds
    its own term.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Add the scalar `value` as term `name`."""
        self.values[name] = value
        self.weights[name] = weight

    def total(self) -> Tensor:
        """Return the weighted sum of all terms."""
        parts = [
            value if self.weights[name] == 1.0 else value * self.weights[name] for name, value in self.values.items()
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@dataclass
class State:
    """Everything a method or a step strategy may read or change.

    `model` is the network itself, `wrapper` the callable to run it with (precision, DDP). `optimizers` are the plain
    ones by name (``"main"``), `steppers` what to call ``step()`` on. `auxiliary` holds trainable modules of methods.
    `stores` holds per-sample tensors, keyed by name and indexed by ``batch.indices``.
    """

    model: nn.Module
    device: torch.device
    taps: FeatureTaps
    clock: Clock = field(default_factory=Clock)
    wrapper: Any = None
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    steppers: dict[str, Any] = field(default_factory=dict)
    schedules: dict[str, Callable[[int], float]] = field(default_factory=dict)
    auxiliary: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    ema: Ema | None = None
    batch: Any = None
    images: Any = None
    targets: Any = None
    outputs: Any = None
    losses: LossTerms = field(default_factory=LossTerms)
    loss: Tensor | None = None
    learning_rate: float = 0.0
    gradient_norm: Tensor | None = None
    stores: dict[str, Tensor] = field(default_factory=dict)
    example: Any = None  # one transformed batch (a few images), to find shapes with
    change: Any = None  # the surgery.StructureChange of the last edit
    history: list[EpochRecord] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The network that validation looks at: the averaged one when EMA is on."""
        return self.ema.module if self.ema is not None else self.model
