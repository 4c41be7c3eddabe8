"""What the evidence scripts of the layers share: a plain training loop, intervals over seeds, the result file."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import ImageData, load_data

RESULTS = Path(__file__).parent / "results"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
Figures = dict[str, float]


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    seed: int,
    batch: int = 64,
    rate: float = 0.05,
    decay: float = 5e-4,
    clip: float = 1.0,
) -> nn.Module:
    """SGD with Nesterov momentum 0.9, one epoch of warm-up, then a cosine; no decay on vectors. Returns it in eval."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, rate, 0.9, nesterov=True)
    steps = len(inputs) // batch
    order = torch.Generator().manual_seed(seed)

    def share(step: int) -> float:
        return min((step + 1) / steps, 0.5 * (1 + math.cos(math.pi * step / (steps * epochs))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=order)[: steps * batch].split(batch):
            optimizer.zero_grad()
            loss(model(inputs[chosen]), targets[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(250)])


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((outputs(model, inputs).argmax(1) == labels).float().mean())


def images_of(data: ImageData, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first `count` images of a split (in its own order) in 0 .. 1, and their labels."""
    part = getattr(data, split)
    indices = list(range(len(part) if count is None else min(count, len(part))))
    return part.images(indices).float() / 255, part.labels[indices]


def load(name: str, shared: Path) -> ImageData:
    return load_data("digits" if name == "digits" else f"parquet:{shared / name}")


def over_seeds(
    arms: Mapping[str, Callable[[int], nn.Module]], seeds: int, run: Callable[[nn.Module, int], Figures]
) -> dict[str, list[Figures]]:
    """Build and run every arm once a seed, seed by seed; the seed sets the weights, the order and what is drawn."""
    found: dict[str, list[Figures]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, build in arms.items():
            started = time.monotonic()
            torch.manual_seed(seed)
            model = build(seed)
            torch.manual_seed(seed)
            count = sum(p.numel() for p in model.parameters())
            found[name].append(run(model, seed) | {"parameters": count})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items())
            note(f"{name}, seed {seed}: {shown}, {time.monotonic() - started:.0f} s")
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t)."""
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def difference(found: Mapping[str, list[Figures]], method: str, baseline: str, key: str) -> tuple[float, float]:
    """Return the mean difference, paired by seed, and half of its 95 % interval."""
    return interval([a[key] - b[key] for a, b in zip(found[method], found[baseline], strict=True)])


def told(found: Mapping[str, list[Figures]], method: str, baseline: str, key: str, points: bool = True) -> str:
    """Return the paired difference in words, in points of a share."""
    mean, half = difference(found, method, baseline, key)
    factor = 100 if points else 1
    verdict = "no difference can be told from chance" if abs(mean) <= half else "a difference beyond chance"
    unit = " points" if points else ""
    low, high = factor * (mean - half), factor * (mean + half)
    what = f"{method} against {baseline}, {key}: {factor * mean:+.2f}{unit}"
    return f"{what} (95 % interval {low:+.2f} to {high:+.2f}): {verdict}."


def write(
    slug: str,
    summary: str,
    found: Mapping[str, list[Figures]],
    started: float,
    *,
    shares: Sequence[str],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results/<slug>.json``: `shares` are shown in per cent."""
    columns = list(next(iter(found.values()))[0])
    rows = {}
    for name, runs in found.items():
        cells = []
        for key in columns:
            mean, half = interval([run[key] for run in runs])
            factor = 100 if key in shares else 1
            cells.append(f"{factor * mean:.4g}" + (f" ± {factor * half:.2g}" if half else ""))
        rows[name] = cells
    titles = [f"{key}, %" if key in shares else key for key in columns]
    result = {"summary": summary, "columns": titles, "rows": rows, "settings": dict(settings), "runs": dict(found)}
    write_json(RESULTS / f"{slug}.json", result | dict(extra or {}) | provenance(time.monotonic() - started))
