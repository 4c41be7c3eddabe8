"""What each recovery after a cut is worth: one trained network, one cut, every switch alone and together.

    python benchmarks/recovery_table.py                       # about ten minutes on one core
    python benchmarks/recovery_table.py --seeds 1 --train-epochs 2 --epochs 1
    python benchmarks/recovery_table.py --data cifar          # about half an hour on one core
    python benchmarks/recovery_table.py --page                # only docs/recovery.md, from the result files

A ResNet-20 of half width is trained on the scikit-learn digits, then cut once to a share of its MACs (L1, global). All
arms of a seed start from the same trained network and the same cut; those that train do so for the same epochs with the
same settings. Accuracies are of the test split, means over seeds with 95 % t-intervals, differences to no recovery
paired by seed. Writes benchmarks/results/recovery_table.json.

With ``--data cifar``: ResNet-20 with given CIFAR-10 weights, two criteria, half and a quarter of the MACs, one cut,
global; training where it trains: three epochs of 9,000 images in bfloat16. ``--steps 5`` cuts as `prune` does when
nothing is said. The seed draws calibration images, the order of training and its augmentation. Arms that the result
file holds are kept. What decides on defaults is the validation split (1,000 images, which the given weights were
trained on); the test split (1,000) is shown beside it. Writes benchmarks/results/recovery_table_cifar.json.
"""

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from convette._files import write_json, write_text
from convette._progress import note
from convette._provenance import provenance
from convette.data import ImageData, load_data
from convette.models import create_model, known_preprocessing
from convette.models.cifar_resnet import CifarResNet
from convette.pipeline.compare import estimate
from convette.pruning import RECOVERY, PruneSettings, prune
from convette.training import TrainSettings, evaluate, train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "recovery_table.json"
OUT_CIFAR = ROOT / "benchmarks" / "results" / "recovery_table_cifar.json"
PAGE = ROOT / "docs" / "recovery.md"
SHARED = ROOT / ".." / "shared" / "data"
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
CIFAR_ARMS: dict[str, dict[str, Any]] = {
    "none": {"epochs": 0, "redistribute": False},
    "least squares": {"epochs": 0, "redistribute": True},
    "distilled": {"redistribute": False},
    "least squares, distilled": {"redistribute": True},
}
CRITERIA, SHARES = ("l1", "taylor"), (0.5, 0.25)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if not options.page:
        (cifar if options.data == "cifar" else digits)(options)
    write_text(PAGE, page())


def digits(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    data = load_data("digits")
    chosen = [arm for arm in ARMS if arm in (options.arms or ARMS)]
    figures: dict[str, list[float]] = {"unpruned": [], **{arm: [] for arm in chosen}}
    seconds: dict[str, list[float]] = {arm: [] for arm in chosen}
    for seed in range(options.seeds):
        parent = trained(data, options.train_epochs, seed)
        figures["unpruned"].append(accuracy(parent, data))
        for arm in chosen:
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
        write_json(options.out or OUT, report(options, figures, seconds, time.perf_counter() - started))


def cifar(options: argparse.Namespace) -> None:
    """Fill the arms that the result file has not got, one seed after the other."""
    out = options.out or OUT_CIFAR
    parent = create_model("resnet20", weights=SHARED / "cifar10-resnet" / "resnet20.safetensors").eval()
    mean, std = known_preprocessing(parent)  # type: ignore[misc]
    data = load_data(f"parquet:{SHARED / 'cifar10-lossless'}", mean=mean, std=std)
    arms = json.loads(out.read_text())["arms"] if out.exists() else {}
    if "unpruned" not in arms:
        arms["unpruned"] = {"validation": accuracy(parent, data, "validation"), "test": accuracy(parent, data)}
    for seed in range(options.seeds):
        for share in options.shares:
            for criterion in options.criteria:
                for arm in [name for name in CIFAR_ARMS if name in (options.arms or CIFAR_ARMS)]:
                    choices = CIFAR_ARMS[arm]
                    key = f"{criterion}, {share:.0%}, {arm}, {options.steps}, {seed}"
                    if key in arms:
                        continue
                    began = time.perf_counter()
                    settings = PruneSettings(criterion=criterion, steps=options.steps, seed=seed, **choices)
                    recovery = replace(
                        RECOVERY, precision="bf16", memory_format="channels_last", validate_every=3, seed=seed
                    )
                    result = prune(parent, data, f"macs<={share:.0%}", settings, train_settings=recovery, device="cpu")
                    arms[key] = {
                        "validation": accuracy(result.model, data, "validation"),
                        "test": accuracy(result.model, data),
                        "macs": result.end.macs / result.start.macs,
                        "seconds": round(time.perf_counter() - began, 1),
                    }
                    note(f"{key}: {arms[key]}")
                    write_json(out, cifar_report(arms))


def cifar_report(arms: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, list[str]] = {}
    for steps, share, criterion in [(n, s, c) for n in (1, 5) for s in SHARES for c in CRITERIA]:
        of = {name: figures(arms, criterion, share, name, steps) for name in CIFAR_ARMS}
        for arm in [name for name in CIFAR_ARMS if of[name]]:
            against = {"least squares": "none", "least squares, distilled": "distilled"}.get(arm)
            gain = differences(*([f["validation"] for f in of[n]] for n in (arm, against))) if against else []
            cuts = "" if steps == 1 else f" in {steps} cuts"
            rows[f"{criterion}, {share:.0%} of the MACs{cuts}, {arm}"] = [
                text([f["validation"] for f in of[arm]]),
                text(gain),
                text([f["test"] for f in of[arm]]),
            ]
    whole = arms["unpruned"]
    return {
        "summary": (
            f"ResNet-20 with given CIFAR-10 weights (validation {whole['validation']:.1%}, test {whole['test']:.1%}),"
            " cut once, global, unless five cuts are said; 3 epochs of 9,000 images where it trains;"
            " gains of least squares are paired by seed."
        ),
        "columns": ["validation accuracy, %", "gained by least squares", "test accuracy, %"],
        "rows": rows,
        "arms": arms,
        **provenance(sum(arm.get("seconds", 0.0) for arm in arms.values())),
    }


def figures(arms: dict[str, Any], criterion: str, share: float, arm: str, steps: int) -> list[dict[str, float]]:
    """Return the figures of an arm, a seed each."""
    start = f"{criterion}, {share:.0%}, {arm}, {steps}, "
    return [arms[key] for key in sorted(arms) if key.startswith(start) and key[len(start) :].isdecimal()]


def page() -> str:
    """Return the page of both tables."""
    parts = [
        "# What each recovery is worth",
        "",
        "A network that was cut is repaired by batch-norm statistics taken anew (`recalibrate`), by least squares"
        " (`redistribute`), by training, with the unpruned network as teacher (`distil`). Means with 95 % t-intervals;"
        " differences are paired by seed. Written by `benchmarks/recovery_table.py`.",
    ]
    for file in [file for file in (OUT_CIFAR, OUT) if file.exists()]:
        found = json.loads(file.read_text())
        parts += ["", f"## {'CIFAR-10' if file is OUT_CIFAR else 'Digits'}", "", found["summary"], ""]
        parts += ["| recovery | " + " | ".join(found["columns"]) + " |", "|---|" + "---:|" * len(found["columns"])]
        parts += [f"| {name} | " + " | ".join(map(str, cells)) + " |" for name, cells in found["rows"].items()]
        parts += ["", f"*{found['machine']}, {found['seconds']:.0f} s.*" if "machine" in found else ""]
    return "\n".join(parts).rstrip() + "\n"


def trained(data: ImageData, epochs: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = CifarResNet(20, data.num_classes, data.preprocessing.channels, (8, 16, 32))
    return train(model, data, TrainSettings(epochs=epochs, precision="fp32", seed=seed), device="cpu").model


def accuracy(model: torch.nn.Module, data: ImageData, split: str = "test") -> float:
    return float(evaluate(copy.deepcopy(model), getattr(data, split), data.preprocessing).accuracy)


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
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *CIFAR_ARMS], help="by default all")
    parser.add_argument("--data", choices=["digits", "cifar"], default="digits")
    parser.add_argument("--steps", type=int, choices=[1, 5], default=1, help="cuts, with --data cifar")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=[*CRITERIA], help="with --data cifar")
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=[*SHARES], help="with --data cifar")
    parser.add_argument("--page", action="store_true", help="write the page from the result files, measure nothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
