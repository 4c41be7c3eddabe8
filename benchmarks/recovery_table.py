"""What each recovery after a cut is worth: one trained network, one cut, every switch alone and together.

    python benchmarks/recovery_table.py                       # about ten minutes on one core
    python benchmarks/recovery_table.py --seeds 1 --train-epochs 2 --epochs 1

A ResNet-20 of half width is trained on the scikit-learn digits, then cut once to a share of its MACs (L1, global). All
arms of a seed start from the same trained network and the same cut; those that train do so for the same epochs with the
same settings. Accuracies are of the test split, means over seeds with 95 % t-intervals, differences to no recovery
paired by seed. Writes benchmarks/results/recovery_table.json.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import ImageData, load_data
from convette.models.cifar_resnet import CifarResNet
from convette.pipeline.compare import estimate
from convette.pruning import PruneSettings, prune
from convette.training import TrainSettings, evaluate, train

OUT = Path(__file__).parent / "results" / "recovery_table.json"
OFF: dict[str, Any] = {"epochs": 0, "recalibrate": False, "redistribute": False}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "batch norm": {"recalibrate": True},
    "least squares": {"redistribute": True},
    "least squares, batch norm": {"redistribute": True, "recalibrate": True},
    "fine-tuning": {"recalibrate": True, "distil": False, "train": True},
    "least squares, fine-tuning": {"recalibrate": True, "redistribute": True, "distil": False, "train": True},
    "distilled, logits": {"recalibrate": True, "train": True},
    "distilled, features": {"recalibrate": True, "distil_from": "features", "train": True},
    "distilled, in place": {"recalibrate": True, "distil_from": "in_place", "train": True},
    "all": {"recalibrate": True, "redistribute": True, "distil_from": "features", "train": True},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = load_data("digits")
    figures: dict[str, list[float]] = {"unpruned": [], **{arm: [] for arm in options.arms}}
    seconds: dict[str, list[float]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        parent = trained(data, options.train_epochs, seed)
        figures["unpruned"].append(accuracy(parent, data))
        for arm in options.arms:
            began = time.perf_counter()
            choices = {**OFF, **ARMS[arm]}
            choices["epochs"] = options.epochs if choices.pop("train", False) else 0
            settings = PruneSettings(steps=1, seed=seed, **choices)
            recovery = TrainSettings(
                learning_rate=0.02, warmup_epochs=0.2, label_smoothing=0.0, precision="fp32", seed=seed
            )
            budget = f"macs<={options.macs:.0%}"
            result = prune(parent, data, budget, settings, train_settings=recovery, device="cpu")
            figures[arm].append(accuracy(result.model, data))
            seconds[arm].append(time.perf_counter() - began)
            note(f"seed {seed}, {arm}: {figures[arm][-1]:.2%} in {seconds[arm][-1]:.1f} s")
        write_json(options.out, report(options, figures, seconds, time.perf_counter() - started))


def trained(data: ImageData, epochs: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = CifarResNet(20, data.num_classes, data.preprocessing.channels, (8, 16, 32))
    return train(model, data, TrainSettings(epochs=epochs, precision="fp32", seed=seed), device="cpu").model


def accuracy(model: torch.nn.Module, data: ImageData) -> float:
    return float(evaluate(copy.deepcopy(model), data.test, data.preprocessing).accuracy)


def report(options: argparse.Namespace, figures: dict, seconds: dict, total: float) -> dict[str, Any]:
    rows = {}
    for arm, values in figures.items():
        cells = [
            text(values),
            "" if arm in ("unpruned", "none") else text(differences(values, figures.get("none", []))),
        ]
        rows[arm] = [*cells, f"{sum(seconds[arm]) / len(seconds[arm]):.1f}" if arm in seconds else ""]
    return {
        "summary": (
            f"ResNet-20 of half width on the digits, cut once to {options.macs:.0%} of its MACs by L1, global; "
            f"{len(figures['unpruned'])} seeds; training where it trains: {options.epochs} epochs."
        ),
        "columns": ["test accuracy, %", "against no recovery", "seconds"],
        "rows": rows,
        "figures": figures,
        **provenance(total),
    }


def differences(values: list[float], baseline: list[float]) -> list[float]:
    return [a - b for a, b in zip(values, baseline, strict=False)]


def text(values: list[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.2f}" if values else ""
    found = estimate(values)
    return f"{100 * found.mean:.2f} ± {50 * (found.high - found.low):.2f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5, help="of training, for the arms that train")
    parser.add_argument("--macs", type=float, default=0.4, help="share of the MACs that stays")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
