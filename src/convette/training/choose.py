"""Choosing precision and memory format by measuring them on this device, where that can pay."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convette.training.settings import TrainSettings

# Below this many multiply-accumulates (forward and backward, the whole training) nothing is measured: minutes on one
# core, a second on a GPU. A rule without a clock in it, so that small trainings come out the same every time.
_WORTH_MEASURING = {"cpu": 3e12, "cuda": 1e14}
# A choice other than plain must be this much faster: timings wobble by a few percent.
_CLEARLY_FASTER = 0.9
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Choice:
    """Precision and memory format of a run, why, and the median milliseconds of a step of each one tried."""

    precision: str
    memory_format: str
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """The memory format as torch names it."""
        return _FORMATS[self.memory_format]

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON types."""
        return asdict(self)


def choose(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Any, Any], Tensor],
    settings: TrainSettings,
    *,
    total_images: int,
    seconds: float = 3.0,
) -> Choice:
    """Return the precision and memory format `settings` name, or where they say ``"auto"`` the fastest measured.

    Training steps (forward, loss, backward) of copies of `model` on the batch `images`, `targets` are timed in turn for
    about `seconds`. Random number generators and `model` stay as they were. Nothing is measured when nothing is left
    open, or when `total_images` through this network is too little work to gain from it.
    """
    precisions = ["fp32", "bf16"] if settings.precision == "auto" else [settings.precision]
    formats = ["contiguous", "channels_last"] if settings.memory_format == "auto" else [settings.memory_format]
    if len(precisions) == len(formats) == 1:
        return Choice(precisions[0], formats[0], "given")
    device = images.device
    work = 3.0 * total_images * _macs(model, images[:1])
    if work < _WORTH_MEASURING.get(device.type, 1e14):
        return Choice(precisions[0], formats[0], f"not measured: {work:.1e} multiply-accumulates in all are too few")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        times = _measure(model, images, targets, loss, [(p, f) for p in precisions for f in formats], seconds)
    return _decide(times, (precisions[0], formats[0]))


def _decide(times: dict[tuple[str, str], float], plain: tuple[str, str]) -> Choice:
    shown = {f"{p} {f}": round(1e3 * value, 3) for (p, f), value in times.items()}
    best = min(times, key=lambda key: times[key]) if times else plain
    if plain in times and times[best] > _CLEARLY_FASTER * times[plain]:
        best = plain
    ratio = times[plain] / times[best] if plain in times else 1.0
    reason = f"measured: {ratio:.2f} times the speed of {' '.join(plain)}" if best != plain else "measured: fastest"
    return Choice(*best, reason, shown)


def _measure(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Any, Any], Tensor],
    candidates: list[tuple[str, str]],
    seconds: float,
) -> dict[tuple[str, str], float]:
    runs = {}
    for precision, form in candidates:
        copied = copy.deepcopy(model).to(images.device, memory_format=_FORMATS[form]).train()  # type: ignore[call-overload]
        batch = images.contiguous(memory_format=_FORMATS[form])
        runs[precision, form] = _Step(copied, batch, targets, loss, precision)
    for key in list(runs):  # warm-up; a device may lack what a candidate needs
        try:
            runs[key]()
        except RuntimeError:
            if key == candidates[0]:
                raise
            del runs[key]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    end = time.monotonic() + seconds
    for round_number in range(50):
        if round_number >= 3 and time.monotonic() > end:
            break
        for key, run in runs.items():
            times[key].append(run())
    return {key: statistics.median(values) for key, values in times.items()}


class _Step:
    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor, loss: Callable, precision: str) -> None:
        self.model, self.images, self.targets, self.loss = model, images, targets, loss
        self.autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def __call__(self) -> float:
        start = time.perf_counter()
        with self.autocast:
            outputs = self.model(self.images)
        self.loss(outputs.float(), self.targets).backward()
        self.model.zero_grad(set_to_none=True)
        if self.images.device.type == "cuda":
            torch.cuda.synchronize(self.images.device)
        return time.perf_counter() - start


@torch.no_grad()
def _macs(model: nn.Module, image: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    copied = copy.deepcopy(model).to(image.device).eval()
    with FlopCounterMode(display=False) as counter:
        copied(image)
    return counter.get_total_flops() / 2
