"""What the evidence scripts do alike: options, images as tensors, a plain training loop, every arm over seeds."""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _figures import Figures
from torch import Tensor, nn
from torch.nn import functional

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import ImageData, load_data
from convette.training import evaluate

Figured = dict[str, Any]


def options(doc: str | None, *, shared: bool = False, seeds: int = 3) -> argparse.Namespace:
    """Read ``--seeds`` and, with `shared`, the folder of the data sets off the command line; one thread from here."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if shared:
        parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=seeds)
    torch.set_num_threads(1)
    return parser.parse_args()


# Images ---------------------------------------------------------------------------------------------------------------


def all_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits (n, 1, 8, 8) in 0 .. 1 and their labels, in its order."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(found.target)


def digits(seed: int, train: int = 718) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the digits split at random: images and labels to train on, then to test on."""
    images, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train:]
    return images[first], labels[first], images[second], labels[second]


def load(name: str, shared: Path) -> ImageData:
    return load_data("digits" if name == "digits" else f"parquet:{shared / name}")


def images_of(data: ImageData, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first `count` images of a split (in its own order) in 0 .. 1, and their labels."""
    part = getattr(data, split)
    indices = list(range(len(part) if count is None else min(count, len(part))))
    return part.images(indices).float() / 255, part.labels[indices]


# Training -------------------------------------------------------------------------------------------------------------


def warm_epoch(step: int, steps: int, epochs: int) -> float:
    """A cosine from 1 to 0, and below it a ramp over the first epoch."""
    return min((step + 1) / (steps // epochs), 0.5 * (1 + math.cos(math.pi * step / steps)))


def warm_tenth(step: int, steps: int, _: int) -> float:
    """A cosine from 1 to 0, times a ramp over the first tenth of the steps."""
    return min(1.0, (step + 1) / max(steps // 10, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


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
    clip: float | None = 1.0,
    schedule: Callable[[int, int, int], float] = warm_epoch,
    adam: bool = False,
    slow: Sequence[nn.Parameter] = (),
    after_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train by SGD with Nesterov momentum 0.9 (or Adam), the rate following `schedule`; returns it in eval mode.

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
    optimizer = torch.optim.Adam(groups, rate) if adam else torch.optim.SGD(groups, rate, 0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    each = len(inputs) // batch
    step, steps = 0, each * epochs
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator)[: each * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate * schedule(step, steps, epochs)
            optimizer.zero_grad()
            loss(model(inputs[chosen]), targets[chosen]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step, steps)
    return model.eval()


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    extra_loss: Callable[[], Tensor] | None = None,
    **how: Any,
) -> nn.Module:
    """Train by cross-entropy, gradients unclipped, warm over a tenth of the steps: the runs of the normalisers."""

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        found = functional.cross_entropy(logits, wanted, class_weights)
        return found if extra_loss is None else found + extra_loss()

    return train(model, images, labels, loss, clip=None, schedule=warm_tenth, **how)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(250)])


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classes `model` gives in eval mode."""
    return model.eval()(images).argmax(1)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((outputs(model, inputs).argmax(1) == labels).float().mean())


def percent_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in eval mode, in percent."""
    return 100 * float((predicted(model, images) == labels).float().mean())


def share_right(model: nn.Module, data: ImageData) -> float:
    """Return the share of right answers on the test split; the model is left as it is."""
    return float(evaluate(copy.deepcopy(model), data.test, data.preprocessing).accuracy)


def go_on(
    out: Path, work: Mapping[str, Callable[[], Figured]], report: Callable[[dict[str, Figured]], dict[str, Any]]
) -> None:
    """Do the `work` that `out` has no results of; it is written anew after each piece: report, runs, provenance."""
    kept: dict[str, Figured] = json.loads(out.read_text()).get("runs", {}) if out.exists() else {}
    for key, one in work.items():
        if key not in kept:
            started = time.perf_counter()
            kept[key] = {**one(), "seconds": round(time.perf_counter() - started, 1)}
        seconds = sum(run["seconds"] for run in kept.values())
        write_json(out, {**report(kept), "runs": kept, **provenance(seconds)})


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
            figures = ", ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items())
            note(f"{name}, seed {seed}: {figures}, {time.monotonic() - started:.0f} s")
    return found
