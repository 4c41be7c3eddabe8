"""What pruning costs: seconds of one CPU thread for each criterion, repair and method, in training steps of the same.

    OMP_NUM_THREADS=1 python benchmarks/pruning_price.py                 # a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/pruning_price.py --only l1 taylor
    python benchmarks/pruning_price.py --page                            # only the page, from the file

A ResNet-20 of half width, 64 images of 32 x 32. A training step is forward, backward and SGD of those images in
float32, measured before and after each item; items that score are run once and divided by it, methods are trained with
and without for the same steps. CPU time of the one thread, not of the clock: another process on the machine slows both
sides alike. Items that the result file holds are kept. Writes benchmarks/results/pruning_price.json and
docs/pruning-price.md.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from convette._files import write_json, write_text
from convette._progress import note, set_quiet
from convette._provenance import provenance
from convette.cost import Budget, WidthCost, count
from convette.data import ImageData, MemorySplit, Preprocessing
from convette.models.cifar_resnet import CifarResNet
from convette.pruning import CRITERIA, find_allocation, redistribute, score_units
from convette.pruning.methods import (
    DynamicChannelPropagation,
    GradualPruning,
    GrowingRegularization,
    HierarchicalGroupSparsity,
    KeepSparsity,
    ProgressiveGradientPruning,
    SoftPruning,
)
from convette.pruning.sparsity import sparsify
from convette.surgery import trace
from convette.training import Method, TrainSettings, train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "pruning_price.json"
PAGE = ROOT / "docs" / "pruning-price.md"
STEPS = 20
METHODS: dict[str, Callable[[], Method]] = {
    "gradual_pruning": lambda: GradualPruning("macs<=50%"),
    "growing_regularization": lambda: GrowingRegularization("macs<=50%"),
    "soft_pruning": lambda: SoftPruning("macs<=50%"),
    "dynamic_channel_propagation": lambda: DynamicChannelPropagation(0.4),
    "progressive_gradient_pruning": lambda: ProgressiveGradientPruning(),
    "hierarchical_group_sparsity": lambda: HierarchicalGroupSparsity(),
    "keep_sparsity": lambda: KeepSparsity(),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20, 10, 3, (8, 16, 32)).eval()


def images(count_: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count_, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = MemorySplit("train", pixels, torch.arange(count_) % 10, 10)
    preprocessing = Preprocessing(3, 32, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    few = MemorySplit("few", pixels[:16], torch.arange(16) % 10, 10)
    return ImageData("noise", tuple("0123456789"), split, few, few, preprocessing, (), (), "noise")


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def training_step(batch: torch.Tensor, labels: torch.Tensor) -> float:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()

    return statistics.median(seconds_of(step) for _ in range(6))


def price_of(name: str, data: ImageData) -> dict[str, float]:
    batch, labels = data.preprocessing(data.train.images(torch.arange(64))), data.train.labels[:64]
    before = training_step(batch, labels)
    if name in METHODS:
        settings = TrainSettings(epochs=1, batch_size=64, augmentation=(), precision="fp32", ema_decay=None)

        def run(*methods: Method) -> float:
            model = network()
            if any(isinstance(method, KeepSparsity) for method in methods):
                sparsify(model, 0.9)
            return seconds_of(lambda: train(model, data, settings, methods=methods, device="cpu"))

        run(), run(METHODS[name]())  # what is imported and compiled once is nobody's price
        pairs = [(run(), run(METHODS[name]())) for _ in range(3)]
        plain, with_it = (statistics.median(side) for side in zip(*pairs, strict=True))
        return {"seconds": (with_it - plain) / STEPS, "step": plain / STEPS}
    model = network()
    graph = trace(model, batch[:1])
    if name == "redistribute":
        macs = count(model, batch[:1]).macs
        widths, half = WidthCost(model, batch[:1], graph), Budget.parse(f"macs<={macs // 2}").limits[0]
        selection = find_allocation("global")(score_units("l1", model, graph), graph, widths, half)
        spent = seconds_of(lambda: redistribute(copy.deepcopy(model), graph, selection, [(batch, labels)]))
    else:
        spent = seconds_of(lambda: score_units(name, model, graph, [(batch, labels)]))
    return {"seconds": spent, "step": (before + training_step(batch, labels)) / 2}


def page(found: dict[str, Any]) -> str:
    prices = found["prices"]
    text = [
        "# What pruning costs",
        "",
        "On a ResNet-20 of half width and 64 images of 32 x 32, in CPU time of one thread, against a training step of"
        " the same images (forward, backward, SGD; float32). Scoring happens once a cut, repair too; methods add to"
        " every step of a training. At inference nothing is left of any of them. Written by"
        " `benchmarks/pruning_price.py`.",
        "",
        "| criterion, once a cut | seconds | training steps |",
        "|---|---:|---:|",
    ]
    scored = sorted((n for n in prices if n not in METHODS), key=lambda n: prices[n]["seconds"] / prices[n]["step"])
    text += [f"| `{n}` | {prices[n]['seconds']:.3g} | {prices[n]['seconds'] / prices[n]['step']:.3g} |" for n in scored]
    if any(name in prices for name in METHODS):
        title = f"method, in a training of {STEPS} steps, its traces, scores and cuts included"
        text += ["", f"| {title} | adds to a step |", "|---|---:|"]
        text += [f"| `{n}` | {prices[n]['seconds'] / prices[n]['step']:+.0%} |" for n in METHODS if n in prices]
    text += ["", f"*{found['machine']}.*"]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    items = ["redistribute", *sorted(CRITERIA), *METHODS]
    parser.add_argument("--only", nargs="+", choices=items, default=items)
    parser.add_argument("--again", action="store_true", help="measure what the result file holds once more")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prices = json.loads(OUT.read_text())["prices"] if OUT.exists() else {}
    data, began = images(64 * STEPS), time.perf_counter()
    for name in [] if options.page else options.only:
        if name in prices and not options.again:
            continue
        set_quiet(True)
        prices[name] = price_of(name, data)
        set_quiet(False)
        note(f"{name}: {prices[name]['seconds']:.3g} s, {prices[name]['seconds'] / prices[name]['step']:.3g} steps")
        write_json(OUT, {"prices": prices, **provenance(time.perf_counter() - began)})
    write_text(PAGE, page(json.loads(OUT.read_text())))


if __name__ == "__main__":
    main()
