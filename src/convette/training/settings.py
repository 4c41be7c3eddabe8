"""Every choice of a training, with strong plain defaults."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from convette.errors import UsageError, did_you_mean

OptimizerName = Literal["sgd", "adamw"]
PrecisionName = Literal["auto", "fp32", "bf16"]
MemoryFormatName = Literal["auto", "contiguous", "channels_last"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train: optimiser, schedule, regularisation, precision.

    - `epochs`: passes over the training split. `batch_size`: images of one forward pass over ALL processes together
      (each of N ranks takes ``batch_size / N``), so the same settings train alike on any number of processes.
      `accumulate`: forward passes per optimiser step; a step sees ``batch_size * accumulate`` images.
    - `learning_rate`: peak rate; None means ``0.1 B/128`` for SGD and ``0.002 sqrt(B/128)`` for AdamW with B images a
      step. It rises linearly over `warmup_epochs` (None: a tenth of the epochs, at most 5), then falls to
      ``final_fraction`` of it along a cosine, changed every step.
    - `momentum` (Nesterov; beta1 for AdamW), `weight_decay` (never on norms and biases), `gradient_clip` (total 2-norm,
      None: off), `label_smoothing` (share of the target spread over all classes).
    - `ema_decay`: decay per step of the exponential moving average of weights and buffers (None: off). When on, the
      averaged network is what validation sees and what `train` returns.
    - `precision`, `memory_format`: ``"auto"`` measures the choices on this device, for trainings long enough to gain
      from it, and keeps the fastest; small ones stay fp32 and contiguous.
    - `augmentation`: names of `convette.training.augmentation`, or ``"auto"``: what is safe for
      these images and class names (`choose_augmentation`).
    - `validate_every`: epochs between looks at the validation split (the last epoch is always looked at).
    - `checkpoint_steps`: also write a checkpoint every so many optimiser steps (None: after each epoch only);
      `keep_checkpoints`: how many to keep.
    - `tensorboard`: also write TensorBoard files to the log folder (needs the extra ``convette[tensorboard]``).

    Raises `UsageError` for values outside their range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    epochs: int = 30
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    learning_rate: float | int | None = None
    momentum: float | int = 0.9
    weight_decay: float | int = 5e-4
    warmup_epochs: float | int | None = None
    final_fraction: float | int = 0.0
    label_smoothing: float | int = 0.1
    ema_decay: float | int | None = 0.99
    precision: PrecisionName = "auto"
    memory_format: MemoryFormatName = "auto"
    augmentation: tuple[str, ...] | Literal["auto"] = "auto"
    accumulate: int = 1
    gradient_clip: float | int | None = None
    seed: int = 0
    validate_every: int = 1
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for key, kind in (
            ("optimizer", OptimizerName),
            ("precision", PrecisionName),
            ("memory_format", MemoryFormatName),
        ):
            value = getattr(self, key)
            if value not in get_args(kind):
                raise UsageError(f"train.{key} = {value!r} is not known.{did_you_mean(str(value), get_args(kind))}")
        for key in ("epochs", "batch_size", "accumulate", "validate_every", "keep_checkpoints"):
            self._need(key, getattr(self, key) >= 1, "at least 1")
        self._need("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0")
        self._need("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._need("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._need("warmup_epochs", self.warmup_epochs is None or self.warmup_epochs >= 0, "0 or more")
        self._need("final_fraction", 0 <= self.final_fraction <= 1, "in [0, 1]")
        self._need("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._need("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1), or left out for none")
        self._need("gradient_clip", self.gradient_clip is None or self.gradient_clip > 0, "above 0")
        self._need("checkpoint_steps", self.checkpoint_steps is None or self.checkpoint_steps >= 1, "at least 1")

    def _need(self, key: str, holds: bool, words: str) -> None:
        if not holds:
            raise UsageError(f"train.{key} = {getattr(self, key)!r} cannot be: it must be {words}.")

    def peak_learning_rate(self, images_per_step: int) -> float:
        """Return the learning rate after warm-up for optimiser steps of `images_per_step` images."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        if self.optimizer == "sgd":
            return 0.1 * images_per_step / 128
        return 2e-3 * math.sqrt(images_per_step / 128)
