"""Accuracy at batch 2 to 128 for every normaliser, on one network and one data set: what each needs of a batch.

    python benchmarks/evidence/normalization_batch_size.py [--seeds 3] [--out benchmarks/evidence/results]

Fixed beforehand: 539 of scikit-learn's digits (8 px), the other 1,258 for the test; the CIFAR ResNet of depth 8 with 8,
16 and 32 channels, 10 epochs whatever the batch, SGD with momentum 0.9 and the linear scaling rule (rate 0.1 at 128
images, in proportion at fewer), a tenth of the steps of warm-up, then a cosine; weight decay 5e-4 (none on norms and
biases), no augmentation, no averaging of weights, one thread, float32. The seed is that of the split, the weights and
the order. Accuracy on the test images, which nothing is chosen by, after the last step. (A first setup, of 1,258 images
and 6 epochs, was cut down to this while it ran, for its hours; nothing else was changed.)

Sparse switchable layers have their growing radius, the ratios and the scalars of consistent units a tenth of the rate.

Goes on where it was stopped: every finished training is kept in normalization_batch_size.json beside the figures.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _figures import interval
from _work import digits, fit, percent_right

from convette._files import write_json, write_text
from convette._progress import note
from convette._provenance import provenance
from convette.layers.normalization import NormLoss, RadiusSchedule, ratio_parameters, unit_scalars
from convette.models.cifar_resnet import CifarResNet
from convette.surgery import Conversion, convert_by

BATCHES = (2, 4, 8, 32, 128)
EPOCHS, IMAGES = 10, 539
NORM = ("BatchNorm2d",)
# What the batch norms of the network become; the method in brackets takes part in training.
NORMALISERS: dict[str, tuple[list[Conversion], str | None]] = {
    "batch norm": ([], None),
    "group norm": ([Conversion("GroupNorm", replace=NORM, options={"num_groups": 4})], None),
    "WeightAlign alone": ([Conversion("weight-align", options={"alone": True})], None),
    "WeightAlign + group norm": (
        [Conversion("weight-align"), Conversion("GroupNorm", replace=NORM, options={"num_groups": 4})],
        None,
    ),
    "WeightAlign + batch norm": ([Conversion("weight-align")], None),
    "sparse switchable": ([Conversion("SparseSwitchNorm2d", replace=NORM)], None),
    "filtered (T = 4)": ([Conversion("FilteredBatchNorm2d", replace=NORM)], None),
    "skewness-reduced": ([Conversion("SkewReducedBatchNorm2d", replace=NORM)], None),
    "BNET-3 (branch ends)": ([Conversion("BNET2d", replace=NORM, where=("last in block",))], None),
    "IBN-a (two stages)": ([Conversion("to_ibn", options={"stages": 2})], None),
    "consistent (tail batch norm)": ([Conversion("to_consistent")], None),
    "bilinear at the stem": (
        [Conversion("BilinearNorm2d", replace=NORM, where=("stem",), options={"rows": 8, "columns": 8})],
        None,
    ),
    "final batch norm": ([Conversion("FinalNormLinear", replace=("Linear",))], None),
    "MixStyle (two stages)": ([Conversion("MixStyle", after=("layer1", "layer2"))], None),
    "norm loss": ([], "norm-loss"),
}


def trained(name: str, batch: int, seed: int) -> float:
    """Train one network and return its accuracy on the test images, in percent."""
    images, labels, test, truth = digits(seed, IMAGES)
    torch.manual_seed(seed)
    model = CifarResNet(8, 10, 1, (8, 16, 32))
    conversions, method = NORMALISERS[name]
    convert_by(model, *conversions, example=images[:2])
    schedule = [RadiusSchedule(EPOCHS * (IMAGES // batch))]
    ratios = ratio_parameters(model)

    def move(step: int, steps: int) -> None:
        schedule[0](model, step)

    fit(
        model,
        images,
        labels,
        epochs=EPOCHS,
        batch=batch,
        rate=0.1 * batch / 128,
        seed=seed,
        decay=0.0 if method == "norm-loss" else 5e-4,
        slow=[*ratios, *unit_scalars(model)],
        extra_loss=NormLoss(model) if method == "norm-loss" else None,
        after_step=move if ratios else None,
    )
    return percent_right(model, test, truth)


def summarised(runs: dict[str, float], names: list[str], seeds: int, seconds: float) -> dict[str, Any]:
    """Return the result file: rows of means with intervals, and every run."""
    rows, drops = {}, {}
    for name in names:
        cells = []
        for batch in BATCHES:
            mean, half = interval([runs[f"{name}/{batch}/{seed}"] for seed in range(seeds)])
            cells.append(f"{mean:.1f} ± {half:.1f}")
        rows[name] = cells
        paired = [runs[f"{name}/2/{seed}"] - runs[f"{name}/128/{seed}"] for seed in range(seeds)]
        drops[name] = statistics.fmean(paired)
    low = {name: statistics.fmean(runs[f"{name}/2/{seed}"] for seed in range(seeds)) for name in names}
    best = sorted(names, key=lambda name: -low[name])[:3]
    summary = (
        f"Test accuracy in percent, means of {seeds} seeds with 95 % intervals. At batch 2 batch norm reaches "
        f"{low['batch norm']:.1f} %, {drops['batch norm']:+.1f} points against its batch 128; the highest means are "
        + ", ".join(f"{name} ({low[name]:.1f} %)" for name in best)
        + ". With as many epochs, small batches take more steps: rows are to be compared down a column."
    )
    return {
        "summary": summary,
        "columns": [f"batch {batch}" for batch in BATCHES],
        "rows": rows,
        "runs": runs,
        "seeds": seeds,
        "epochs": EPOCHS,
        **provenance(seconds),
    }


def picture(runs: dict[str, float], names: list[str], seeds: int) -> str:
    """Return the study as an SVG: one small chart a normaliser, batch norm in grey behind each."""
    columns, width, height, left, top = 3, 250, 170, 40, 34
    rows = math.ceil(len(names) / columns)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {rows * height}" role="img" '
        'font-family="sans-serif" font-size="10"><title>Test accuracy against batch size, each normaliser (blue) and '
        "batch norm (grey)</title>",
        f'<rect width="{columns * width}" height="{rows * height}" fill="white"/>',
    ]
    floor = min(statistics.fmean(runs[f"{n}/{b}/{s}"] for s in range(seeds)) for n in names for b in BATCHES)
    floor = math.floor((floor - 3) / 10) * 10

    def point(column: float, value: float) -> tuple[float, float]:
        x = left + column * (width - left - 20) / (len(BATCHES) - 1)
        return x, top + (100 - value) / (100 - floor) * (height - top - 26)

    for index, name in enumerate(names):
        lines.append(f'<g transform="translate({index % columns * width} {index // columns * height})">')
        lines.append(f'<text x="{left}" y="20" font-weight="bold" font-size="11">{name}</text>')
        for value in range(floor, 101, 10):
            y = point(0, value)[1]
            lines.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
            lines.append(f'<text x="{left - 5}" y="{y + 3:.1f}" text-anchor="end" fill="#555">{value}</text>')
        for column, batch in enumerate(BATCHES):
            x, _ = point(column, 100)
            lines.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" fill="#555">{batch}</text>')
        for shown, colour in (("batch norm", "#999999"), (name, "#1f5fa8")):
            found = [interval([runs[f"{shown}/{b}/{s}"] for s in range(seeds)]) for b in BATCHES]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (point(c, mean) for c, (mean, _) in enumerate(found)))
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            for column, (mean, half) in enumerate(found):
                x, y = point(column, mean)
                ends = [point(column, min(100, max(floor, mean + side * half)))[1] for side in (-1, 1)]
                lines.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>'
                )
                lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/evidence/results"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; call again to go on")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/normalization_batch_size.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "normalization_batch_size.json"
    kept = arguments.out / "normalization_batch_size.part.json"
    state = json.loads(kept.read_text()) if kept.exists() else {"runs": {}, "seconds": 0.0}
    names = list(NORMALISERS)
    begun = time.monotonic()
    # The large batches first: they are quick, and an early stop leaves whole columns.
    for batch, seed, name in itertools.product(reversed(BATCHES), range(arguments.seeds), names):
        key = f"{name}/{batch}/{seed}"
        if key in state["runs"]:
            continue
        if time.monotonic() - begun > 60 * arguments.minutes:
            return
        started = time.monotonic()
        state["runs"][key] = trained(name, batch, seed)
        state["seconds"] += time.monotonic() - started
        write_json(kept, state)
        note(f"{key}: {state['runs'][key]:.1f} %, {time.monotonic() - started:.1f} s")
    write_json(path, summarised(state["runs"], names, arguments.seeds, state["seconds"]))
    write_text(arguments.picture, picture(state["runs"], names, arguments.seeds))
    kept.unlink()


if __name__ == "__main__":
    main()
