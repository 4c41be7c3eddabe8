"""Filtered batch norm: steadier moments, and what it is worth with clean inputs and with salt noise (synthetic).

    python benchmarks/evidence/filtered_batch_norm.py

Written before any result: 718 digits, two convolutions and two linear layers with norms (LeNet-like), batches of 16 for
6 epochs and of 128 for 24 (in 6 those had not trained), SGD at 0.1 B/128, 3 seeds. Noise: 0.5 % of the training and of
the test pixels become 20 (the digits lie in 0..1): synthetic. "Spread": standard deviation over the training steps of
the last convolution's variance as used, over its mean. "Left out": share of the values beyond T in that layer at the
end. Expected: a smaller spread with T = 3 and 4; accuracy about the same when clean, better with noise.
"""

import statistics
import time

import torch
from _figures import against, shown, write_rows
from _work import digits, fit, percent_right
from torch import Tensor, nn

from convette.layers.normalization import FilteredBatchNorm2d, filter_batch_norm, filtered_moments, outlier_report

SEEDS, EPOCHS = 3, {16: 6, 128: 24}
THRESHOLDS = {"batch norm": None, "T = 3": 3.0, "T = 4": 4.0}


def network(threshold: float | None, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
    )
    if threshold is not None:
        filter_batch_norm(model, threshold)
    return model


def salted(images: Tensor, seed: int) -> Tensor:
    chosen = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) < 0.005
    return torch.where(chosen, 20.0, images)


def watched(model: nn.Sequential, seen: list[float]) -> None:
    """Note the variance that the last convolution's norm uses, a mean over channels, at every step."""
    norm = model[5]

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            x = inputs[0].detach()
            if isinstance(module, FilteredBatchNorm2d):
                seen.append(float(filtered_moments(x, module.threshold, module.eps)[0].var.mean()))
            else:
                seen.append(float(x.var((0, 2, 3), correction=0).mean()))

    norm.register_forward_pre_hook(look)


def main() -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    cases = [(kind, batch, name) for kind in ("clean", "salt") for batch in (16, 128) for name in THRESHOLDS]
    right: dict[str, list[float]] = {f"{kind}, batch {batch}, {name}": [] for kind, batch, name in cases}
    spread: dict[str, list[float]] = {key: [] for key in right}
    left: dict[str, list[float]] = {key: [] for key in right}
    for seed in range(SEEDS):
        clean, labels, clean_test, truth = digits(seed)
        for kind, batch, name in cases:
            images, test = (
                (clean, clean_test) if kind == "clean" else (salted(clean, seed), salted(clean_test, seed + 99))
            )
            key = f"{kind}, batch {batch}, {name}"
            model, seen = network(THRESHOLDS[name], seed), []
            watched(model, seen)
            fit(model, images, labels, epochs=EPOCHS[batch], batch=batch, rate=0.1 * batch / 128, seed=seed)
            right[key].append(percent_right(model, test, truth))
            late = seen[len(seen) // 3 :]  # the first third is the warm-up and the fall of the loss
            spread[key].append(statistics.stdev(late) / statistics.fmean(late))
            left[key].append(100 * outlier_report(model, [test], THRESHOLDS[name] or 4.0)["5"])
    rows = {key: [shown(right[key]), shown(spread[key], digits=3), shown(left[key], digits=2)] for key in right}

    def gain(kind: str, batch: int) -> str:
        return against(right[f"{kind}, batch {batch}, T = 4"], right[f"{kind}, batch {batch}, batch norm"])

    def steadier(kind: str) -> str:
        both = [statistics.fmean(spread[f"{kind}, batch 16, {name}"]) for name in ("T = 4", "batch norm")]
        return f"{100 * (both[0] / both[1] - 1):+.0f} %"

    summary = (
        f"LeNet-like network on 718 digits, {SEEDS} seeds, T = 4 against batch norm, in points: clean at batch 16 "
        f"{gain('clean', 16)}, at batch 128 {gain('clean', 128)}; with salt noise (synthetic) at batch 16 "
        f"{gain('salt', 16)}, at batch 128 {gain('salt', 128)}. The spread of the last convolution's variance over "
        f"steps of 16 changes by {steadier('clean')} clean and {steadier('salt')} with noise."
    )
    columns = ["accuracy in %", "spread of the variance", "left out in %"]
    write_rows("filtered-batch-norm", started, summary, columns, rows, accuracy=right, spread=spread, left_out=left)


if __name__ == "__main__":
    main()
