"""What the small experiments of the normalisers share: the digits as tensors, a plain training loop, result files."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._files import write_json
from convette._provenance import provenance

RESULTS = Path(__file__).parent / "results"


def digits(seed: int, train: int = 718) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits (n, 1, 8, 8) in 0..1 and their labels, split at random: training, then test."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train:]
    return images[first], labels[first], images[second], labels[second]


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    class_weights: Tensor | None = None,
    adam: bool = False,
    decay: float = 5e-4,
    slow: Sequence[nn.Parameter] = (),
    extra_loss: Callable[[], Tensor] | None = None,
    after_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train by SGD with momentum 0.9 (or Adam), the rate falling along a cosine; returns the network in eval mode.

    Weight decay is for matrices and kernels only. `slow` parameters learn at a tenth of the rate. `after_step` gets the
    steps done and their number in all. A last incomplete batch is left out; the order follows from `seed`.
    """
    known = {id(parameter) for parameter in slow}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": decay, "share": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "share": 1.0},
        {"params": list(slow), "weight_decay": 0.0, "share": 0.1},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.Adam(groups, rate) if adam else torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // batch)
    step = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for first in range(0, len(labels) - batch + 1, batch):
            warm = min(1.0, (step + 1) / max(steps // 10, 1))
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            chosen = order[first : first + batch]
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen], class_weights)
            loss = loss if extra_loss is None else loss + extra_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step, steps)
    return model.eval()


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classes `model` gives."""
    return model.eval()(images).argmax(1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent."""
    return 100 * float((predicted(model, images) == labels).float().mean())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Return ``mean ± half width``."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def against(values: Sequence[float], baseline: Sequence[float], digits: int = 1) -> str:
    """Return the paired difference in words: mean and 95 % interval, and whether it can be told from chance."""
    mean, half = interval([a - b for a, b in zip(values, baseline, strict=True)])
    verdict = "beyond chance" if abs(mean) > half else "not to be told from chance"
    return f"{mean:+.{digits}f} (95 % interval {mean - half:+.{digits}f} to {mean + half:+.{digits}f}, {verdict})"


def write(
    slug: str, started: float, summary: str, columns: list[str], rows: Mapping[str, list[str]], **raw: Any
) -> None:
    """Write the result file of a system."""
    body = {"slug": slug, "summary": summary, "columns": columns, "rows": dict(rows), **raw}
    write_json(RESULTS / f"{slug}.json", {**body, **provenance(time.monotonic() - started)})
