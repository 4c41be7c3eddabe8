"""ResNet-56 to half its MACs and back: our pruning next to magnitude pruning with Torch-Pruning, the same recovery.

    python benchmarks/pruning_resnet56.py                 # everything: an hour or more on two cores
    python benchmarks/pruning_resnet56.py --images 600 --epochs 1 --arms l1 tp_l2_global

Arms that the result file holds already, made with the same choices, are kept; delete the file to measure them anew.

Every arm starts from the given weights, is pruned to the same limit on MACs (our counter for all), gets its
batch-norm statistics anew from the same images and the same epochs of training with the same settings and the same
teacher. The validation split (a tenth of the training images, which the given weights saw) serves for choosing; the
test split is looked at once an arm, for the table. Torch-Pruning 1.6.1 (`pip install convette[benchmarks]`) prunes the
inner layers of the blocks only: it does not know what the zero-padding shortcuts do to channels, so the residual
streams are given to it as layers to ignore.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.cost import Budget, count
from convette.data import ImageData, MemorySplit, load_data
from convette.models import create_model, known_preprocessing
from convette.pruning import RECOVERY, PruneSettings, prune, recalibrate, recover
from convette.training import evaluate

OUT = Path(__file__).parent / "results" / "pruning_resnet56.json"
SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
# Arm -> what is chosen in PruneSettings.
OURS: dict[str, dict[str, Any]] = {
    "l1": {"criterion": "l1"},
    "l2": {"criterion": "l2"},
    "lamp": {"criterion": "lamp"},
    "taylor": {"criterion": "taylor", "calibration_images": 512},
    "l1_uniform": {"criterion": "l1", "allocation": "uniform"},
    "random_uniform": {"criterion": "random", "allocation": "uniform"},
}
# Arm -> arguments of Torch-Pruning's pruner, norm of its magnitude.
THEIRS: dict[str, dict[str, Any]] = {
    "tp_l2_global": {"global_pruning": True, "p": 2},
    "tp_l2_uniform": {"global_pruning": False, "p": 2},
    "tp_l1_global": {"global_pruning": True, "p": 1},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    parent = create_model("resnet56", weights=options.weights).eval()
    mean, std = known_preprocessing(parent)
    data = load_data(f"parquet:{options.data}", mean=mean, std=std)
    data = data if options.images is None else fewer(data, options.images)
    settings = dataclasses.replace(RECOVERY, seed=options.seed, precision="fp32", memory_format="contiguous")
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    arms = {"unpruned": scores(parent, data, example), **measured_before(options, data)}
    for arm in [name for name in options.arms if name not in arms]:
        note(f"--- {arm}")
        began = time.perf_counter()
        if arm in OURS:
            figures = ours(parent, data, options, settings, OURS[arm], example)
        else:
            figures = theirs(parent, data, options, settings, dict(THEIRS[arm]), example)
        arms[arm] = {**figures, "seconds": round(time.perf_counter() - began, 1)}
        note(f"{arm}: {arms[arm]}")
        write_json(options.out, result(options, settings, data, arms, started))
    note(f"written: {options.out.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHARED / "cifar10-resnet" / "resnet56.safetensors")
    parser.add_argument("--data", type=Path, default=SHARED / "cifar10-lossless")
    parser.add_argument("--budget", default="macs<=50%")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, help="training images to use (default: all)")
    parser.add_argument("--arms", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def measured_before(options: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    """Return the arms that an earlier run with the same choices has in the result file."""
    if not options.out.exists():
        return {}
    found = json.loads(options.out.read_text())
    same = {"budget": options.budget, "epochs": options.epochs, "seed": options.seed}
    same["training_images"] = len(data.train)
    if any(found.get(key) != value for key, value in same.items()):
        return {}
    return {name: figures for name, figures in found["arms"].items() if name != "unpruned"}


def fewer(data: ImageData, images: int) -> ImageData:
    """Return `data` with the first `images` training images only."""
    train = MemorySplit("train", data.train.images(slice(0, images)), data.train.labels[:images], data.num_classes)
    return dataclasses.replace(data, train=train, fingerprint=f"{data.fingerprint}-{images}")


def ours(parent, data, options, settings, choices, example) -> dict[str, Any]:
    chosen = PruneSettings(epochs=options.epochs, seed=options.seed, redistribute=False, **choices)
    found = prune(parent, data, options.budget, chosen, train_settings=settings, device="cpu")
    return {
        **scores(found.model, data, example),
        "validation_before_recovery": found.steps[-1].accuracy_before_recovery,
        "settings": asdict(chosen),
    }


def theirs(parent, data, options, settings, choices, example) -> dict[str, Any]:
    limit = Budget.parse(options.budget).resolve(count(parent, example)).limits[0].value
    network, ratio = torch_pruned(parent, example, limit, **choices)
    recalibrate(network, data, seed=options.seed)
    before = evaluate(network, data.validation, data.preprocessing).accuracy
    network, _ = recover(network, parent, data, options.epochs, PruneSettings(), train_settings=settings, device="cpu")
    return {
        **scores(network, data, example),
        "validation_before_recovery": before,
        "settings": {**choices, "pruning_ratio": ratio},
    }


def torch_pruned(parent: nn.Module, example, limit: float, *, global_pruning: bool, p: int) -> tuple[nn.Module, float]:
    """Prune a copy with Torch-Pruning to the smallest ratio whose MACs (our count) are within `limit`."""
    import torch_pruning

    def at(ratio: float) -> nn.Module:
        network = copy.deepcopy(parent)
        stream = [network.conv1, *(m for name, m in network.named_modules() if name.endswith("conv2")), network.linear]
        pruner = torch_pruning.pruner.BasePruner(
            network,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=p),
            pruning_ratio=ratio,
            global_pruning=global_pruning,
            max_pruning_ratio=0.9,
            ignored_layers=stream,
        )
        pruner.step()
        return network

    low, high = 0.0, 0.9
    while high - low > 0.002:
        middle = (low + high) / 2
        low, high = (low, middle) if count(at(middle), example).macs <= limit else (middle, high)
    return at(high), high


def scores(network: nn.Module, data: ImageData, example) -> dict[str, Any]:
    cost = count(network, example)
    test = evaluate(network, data.test, data.preprocessing)
    return {
        "macs": cost.macs,
        "parameters": cost.parameters,
        "validation_accuracy": evaluate(network, data.validation, data.preprocessing).accuracy,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "widths": {
            name: module.out_channels for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
        },
    }


def result(options, settings, data, arms, started) -> dict[str, Any]:
    measured = {name: figures for name, figures in arms.items() if name != "unpruned"}
    return {
        "what": "ResNet-56, given CIFAR-10 weights, pruned to the budget and recovered; accuracies are shares of "
        f"{len(data.validation)} validation and {len(data.test)} test images",
        "data": data.source if data.source.startswith("parquet:..") else "parquet:../shared/data/cifar10-lossless",
        "training_images": len(data.train),
        "budget": options.budget,
        "epochs": options.epochs,
        "seed": options.seed,
        "recovery": {**asdict(settings), "epochs": options.epochs},
        "best_on_validation": max(measured, key=lambda name: measured[name]["validation_accuracy"], default=None),
        "arms": arms,
        "torch_pruning": importlib.metadata.version("torch-pruning"),
        **provenance(time.perf_counter() - started),
    }


if __name__ == "__main__":
    main()
