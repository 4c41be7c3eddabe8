"""Every criterion, at three costs, with three recoveries, on ResNets with given CIFAR-10 weights: a table, a picture.

    python benchmarks/pruning_table.py                # everything: hours on a CPU, better a GPU
    python benchmarks/pruning_table.py --networks resnet20 --recoveries none least_squares --criteria l1 fisher
    python benchmarks/pruning_table.py --page         # only the page and the picture, from the file

Every arm starts from the given weights and is cut once to the same limit on MACs (our counter for all) by the same
allocation: the same share of every layer, unless `--allocation global` is given, so that arms differ by the criterion
and the recovery alone: "none" (batch-norm statistics taken anew, as everywhere), "least_squares" (redistribution before
the cut, on the criterion's calibration images) or "distilled" (three epochs taught by the unpruned network).
Torch-Pruning's criteria (`pip install convette[benchmarks]`) score and rank by themselves, one share for every inner
layer (its graph cannot tie channels over zero-padding shortcuts, so residual streams stay whole) until our count of
MACs meets the limit; the cut and the recovery are the same as ours.

Arms that the result file holds, made with the same choices, are kept: the table can be filled in any number of
sittings. Accuracy is on the test split (1,000 original images), seen once an arm; nothing is chosen by it.
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _torch_pruning import their_choice, their_scores
from convette import surgery
from convette._files import write_json, write_text
from convette._progress import note
from convette._provenance import provenance
from convette.cost import Budget, WidthCost, count
from convette.data import ImageData, MemorySplit, load_data
from convette.models import create_model, known_preprocessing
from convette.pruning import (
    CRITERIA,
    RECOVERY,
    PruneSettings,
    find_allocation,
    recalibrate,
    recover,
    redistribute,
    score_units,
)
from convette.training import evaluate, resolve_device

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "pruning_table.json"
PAGE = ROOT / "docs" / "pruning-table.md"
PICTURE = ROOT / "docs" / "pruning-table.svg"
SHARED = ROOT / ".." / "shared" / "data"
SPEEDUPS = (2.0, 2.5, 4.0)
RECOVERIES = ("none", "least_squares", "distilled")
SHOWN = {"none": "no recovery", "least_squares": "least squares", "distilled": "3 epochs distilled"}
# What each takes on a network of a few hundred channels; everything else as it comes.
OPTIONS: dict[str, dict[str, Any]] = {"trajectory": {"images": 32}, "blend": {"generations": 4, "population": 10}}
THEIRS = ("tp_l1", "tp_l2", "tp_lamp", "tp_geometric_median", "tp_bn_scale", "tp_taylor", "tp_hessian", "tp_random")
DRAWN = {"random": 3, "tp_random": 3}


def main() -> None:
    options = parse()
    if not options.page:
        fill(options)
    found = json.loads(options.out.read_text())
    write_text(PAGE, page(found))
    picture(found, PICTURE)
    note(f"written: {PAGE.name}, {PICTURE.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--criteria", nargs="+", choices=[*CRITERIA, *THEIRS], default=[*CRITERIA, *THEIRS])
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=[*RECOVERIES])
    parser.add_argument("--speedups", nargs="+", type=float, default=[*SPEEDUPS])
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--training-images", type=int, help="images of an epoch where it trains; default: all")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the training afterwards")
    parser.add_argument("--data", type=Path, default=SHARED / "cifar10-lossless")
    parser.add_argument("--weights", type=Path, default=SHARED / "cifar10-resnet")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--page", action="store_true", help="write page and picture from the result file, measure nothing"
    )
    return parser.parse_args()


# -- measuring ----------------------------------------------------------------------------------------------------


def fill(options: argparse.Namespace) -> None:
    """Measure the arms that are asked for and not in the file yet; the file is written after each."""
    arms = kept_arms(options)
    for name in options.networks:
        bench = Bench(name, options)
        whole = arms.setdefault(f"{name} unpruned", bench.unpruned())
        if whole["training_images"] != len(bench.data.train):
            raise SystemExit(f"{name} was trained on {whole['training_images']} images before: --training-images")
        for criterion in options.criteria:
            for seed in range(DRAWN.get(criterion, 1)):
                missing = [
                    (speedup, recovery)
                    for speedup in options.speedups
                    for recovery in options.recoveries
                    if key(name, criterion, speedup, recovery, seed) not in arms
                ]
                for speedup, recovery, figures in bench.arms(criterion, seed, missing, arms):
                    arms[key(name, criterion, speedup, recovery, seed)] = figures
                    # Another process may be filling the same table.
                    arms = {**kept_arms(options), **arms}
                    write_json(options.out, result(options, arms))
    write_json(options.out, result(options, arms))


class Remembering(nn.Module):
    """A teacher that answers from memory what it has been asked before: arms of one seed see the same images."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.answers: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        asked = hashlib.sha256(images.contiguous().cpu().numpy().tobytes()).hexdigest()
        if asked not in self.answers:
            self.answers[asked] = self.teacher(images)
        return self.answers[asked]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remembering":
        return self


def first_images(split: MemorySplit, number: int) -> MemorySplit:
    """Return a part of `split`: `number` images drawn with a fixed seed."""
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:number]
    return MemorySplit(split.name, split.pixels, split.labels[rows], split.num_classes, split.rows[rows])


def fingerprint(selection: Mapping[str, Tensor]) -> str:
    """Return a short digest of which units stay."""
    text = json.dumps({name: kept.tolist() for name, kept in sorted(selection.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(network: str, criterion: str, speedup: float, recovery: str, seed: int) -> str:
    return f"{network} {criterion} {speedup:g}x {recovery} {seed}"


def choices(options: argparse.Namespace) -> dict[str, Any]:
    """Return what two sittings have to agree in."""
    return {
        "allocation": options.allocation,
        "calibration_images": options.calibration_images,
        "epochs": options.epochs,
        "precision": options.precision,
        "data": f"parquet:../shared/data/{options.data.name}",
    }


def kept_arms(options: argparse.Namespace) -> dict[str, Any]:
    if not options.out.exists():
        return {}
    found = json.loads(options.out.read_text())
    if found["choices"] != choices(options):
        raise SystemExit(f"{options.out.name} was made with other choices: {found['choices']}; name another --out.")
    return found["arms"]


def result(options: argparse.Namespace, arms: Mapping[str, Any]) -> dict[str, Any]:
    seconds = sum(float(arm["seconds"]) for arm in arms.values())
    return {"choices": choices(options), "arms": dict(arms), **provenance(seconds)}


class Bench:
    """One network with its data: scores it by any criterion, cuts it, repairs it, looks at the test split."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.device = resolve_device(options.device)
        self.parent = create_model(name, weights=options.weights / f"{name}.safetensors").eval().to(self.device)
        mean, std = known_preprocessing(self.parent)  # type: ignore[misc]
        self.data: ImageData = load_data(f"parquet:{options.data}", mean=mean, std=std)
        if options.training_images:
            self.data = replace(self.data, train=first_images(self.data.train, options.training_images))
        # Nothing is chosen by it here, and every epoch of the recovery ends with a look at it.
        self.data = replace(self.data, validation=first_images(self.data.validation, 128))
        self.teacher = Remembering(self.parent)
        self.example = self.data.preprocessing(self.data.train.images(torch.tensor([0]))).to(self.device)
        self.graph = surgery.trace(self.parent, self.example)
        self.widths = WidthCost(self.parent, self.example, self.graph)
        self.start = count(self.parent, self.example)
        self.calibration = self._calibration()

    def _calibration(self) -> list[tuple[Tensor, Tensor]]:
        found, left = [], self.options.calibration_images
        for batch in self.data.train.batches(min(64, left), shuffle=True, seed=0):
            images = self.data.preprocessing(batch.images[:left].to(self.device))
            found.append((images, batch.labels[:left].to(self.device)))
            left -= len(found[-1][1])
            if left <= 0:
                return found
        return found

    def unpruned(self) -> dict[str, Any]:
        began = time.perf_counter()
        test = evaluate(self.parent, self.data.test, self.data.preprocessing, device=self.device)
        return {
            "accuracy": test.accuracy,
            "macs": self.start.macs,
            "training_images": len(self.data.train),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def arms(self, criterion: str, seed: int, wanted: list[tuple[float, str]], known: Mapping[str, Any]):
        """Yield speed-up, recovery and figures of each arm; the scores are taken once for all of them.

        An arm that keeps the same units as one of `known` has that one's figures: the rest of the work is the same.
        """
        if not wanted:
            return
        began = time.perf_counter()
        choose = self.theirs(criterion, seed) if criterion in THEIRS else self.ours(criterion, seed)
        scoring = round(time.perf_counter() - began, 2)
        for speedup, recovery in wanted:
            began = time.perf_counter()
            selection = choose(self.start.macs / speedup)
            digest = fingerprint(selection)
            same = self.same_cut(known, digest, recovery, seed)
            if same is not None:
                yield speedup, recovery, {**same, "scoring_seconds": scoring, "seconds": scoring}
                continue
            network = self.cut(selection, recovery, seed)
            test = evaluate(network, self.data.test, self.data.preprocessing, device=self.device)
            cost = count(network, self.example)
            figures = {
                "accuracy": test.accuracy,
                "loss": test.loss,
                "macs": cost.macs,
                "parameters": cost.parameters,
                "selection": digest,
                "scoring_seconds": scoring,
                "seconds": round(time.perf_counter() - began + (scoring if (speedup, recovery) == wanted[0] else 0), 1),
            }
            note(f"{key(self.name, criterion, speedup, recovery, seed)}: {test.accuracy:.3f}, {figures['seconds']} s")
            yield speedup, recovery, figures

    def same_cut(self, known: Mapping[str, Any], digest: str, recovery: str, seed: int) -> dict[str, Any] | None:
        for name, arm in known.items():
            parts = name.split()
            if arm.get("selection") == digest and (parts[0], parts[3:]) == (self.name, [recovery, str(seed)]):
                return arm
        return None

    def ours(self, criterion: str, seed: int):
        scores = score_units(
            criterion, self.parent, self.graph, self.calibration, seed=seed, options=OPTIONS.get(criterion)
        )
        allocate = find_allocation(self.options.allocation)

        def choose(limit: float) -> Mapping[str, Tensor]:
            return allocate(scores, self.graph, self.widths, self._limit(limit))

        return choose

    def theirs(self, criterion: str, seed: int):
        """Return what Torch-Pruning keeps of every inner layer, by the least share that meets a limit."""
        stream = [n for n in dict(self.parent.named_modules()) if n in ("conv1", "linear") or n.endswith(".conv2")]
        scores = their_scores(criterion, self.parent, self.example, self.calibration, stream, seed)

        def choose(limit: float) -> Mapping[str, Tensor]:
            low, high = 0.0, 0.97
            while high - low > 0.004:
                middle = (low + high) / 2
                fits = self.widths.macs(their_choice(scores, middle)) <= limit
                low, high = (low, middle) if fits else (middle, high)
            selection = their_choice(scores, high)
            if self.widths.macs(selection) > limit:
                note(f"{criterion}: inner layers alone cannot meet {limit:.3g} MACs")
            return selection

        return choose

    def cut(self, selection: Mapping[str, Tensor], recovery: str, seed: int) -> nn.Module:
        network = copy.deepcopy(self.parent)
        if recovery == "least_squares":
            redistribute(network, self.graph, selection, self.calibration)
        if selection:
            surgery.apply(network, self.graph.shrink(selection))
        recalibrate(network, self.data, batches=4, seed=seed)
        if recovery == "distilled":
            chosen = replace(RECOVERY, seed=seed, precision=self.options.precision, memory_format="channels_last")
            network, _ = recover(
                network,
                self.teacher,
                self.data,
                self.options.epochs,
                PruneSettings(),
                train_settings=chosen,
                device=self.device,
            )
        return network.eval()

    def _limit(self, macs: float) -> Any:
        return Budget.parse(f"macs<={math.floor(macs)}").limits[0]


# -- showing ------------------------------------------------------------------------------------------------------


def mean_of(arms: Mapping[str, Any], network: str, criterion: str, speedup: float, recovery: str) -> float | None:
    found = [
        arms[name]["accuracy"]
        for seed in range(DRAWN.get(criterion, 1))
        if (name := key(network, criterion, speedup, recovery, seed)) in arms
    ]
    return statistics.fmean(found) if found else None


def measured(arms: Mapping[str, Any]) -> tuple[list[str], list[str], list[float], list[str]]:
    """Return the networks, criteria, speed-ups and recoveries that have arms, in their order."""
    parts = [name.split() for name in arms if not name.endswith("unpruned")]
    networks = sorted({p[0] for p in parts}, key=lambda n: int(n.removeprefix("resnet")))
    criteria = [name for name in (*CRITERIA, *THEIRS) if any(p[1] == name for p in parts)]
    speedups = sorted({float(p[2].removesuffix("x")) for p in parts})
    return networks, criteria, speedups, [r for r in RECOVERIES if any(p[3] == r for p in parts)]


def page(found: Mapping[str, Any]) -> str:
    """Return the page: a table a network."""
    arms = found["arms"]
    networks, criteria, speedups, recoveries = measured(arms)
    how = found["choices"]
    lines = [
        "# Every criterion, side by side",
        "",
        "Networks with given CIFAR-10 weights, cut once to a share of their MACs, "
        + ("the same share of every layer" if how["allocation"] == "uniform" else f"allocation `{how['allocation']}`")
        + f", scored on {how['calibration_images']} training images; batch-norm statistics taken anew in all arms. "
        "Test accuracy in percent on 1,000 original images: arms less than about two points apart are not told apart. "
        "`random` is the mean of three draws. `tp_...` are the criteria of Torch-Pruning, which cuts the inner layers "
        "of the blocks only, here with our cut and recovery. Empty: not measured yet.",
        "",
        "![Accuracy by criterion](pruning-table.svg)",
        "",
    ]
    for network in networks:
        whole = arms[f"{network} unpruned"]
        lines += [
            f"## {network}",
            "",
            f"Unpruned: {100 * whole['accuracy']:.1f} %, {whole['macs'] / 1e6:.2f} M MACs. "
            f"An epoch of the distilled arms: {whole['training_images']:,} training images.",
            "",
        ]
        columns = [f"{speedup:g}x, {SHOWN[recovery]}" for speedup in speedups for recovery in recoveries]
        lines += ["| criterion | " + " | ".join(columns) + " | seconds to score |", "|---" * (len(columns) + 2) + "|"]
        for criterion in criteria:
            cells = []
            for speedup in speedups:
                for recovery in recoveries:
                    value = mean_of(arms, network, criterion, speedup, recovery)
                    cells.append("" if value is None else f"{100 * value:.1f}")
            if any(cells):
                seconds = next(
                    arm["scoring_seconds"] for name, arm in arms.items() if name.startswith(f"{network} {criterion} ")
                )
                cells.append("" if criterion in THEIRS else f"{seconds:.1f}")
                lines.append(f"| `{criterion}` | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append(f"Command: `{found['command']}` (the last sitting), on {found['machine']}; {found['versions']}.")
    return "\n".join(lines) + "\n"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw a panel a network and speed-up: accuracy by criterion, a mark a recovery."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "convette"
    from matplotlib import pyplot

    arms = found["arms"]
    networks, criteria, speedups, recoveries = measured(arms)
    figure, axes = pyplot.subplots(
        len(networks),
        len(speedups),
        figsize=(3.6 * len(speedups) + 1.5, 0.21 * len(criteria) * len(networks) + 1.2),
        sharey=True,
        squeeze=False,
    )
    marks = {"none": ("o", "#888888"), "least_squares": ("D", "#00796b"), "distilled": ("s", "#c2185b")}
    for row, network in enumerate(networks):
        for column, speedup in enumerate(speedups):
            axis = axes[row][column]
            for recovery in recoveries:
                values = {i: mean_of(arms, network, name, speedup, recovery) for i, name in enumerate(criteria)}
                seen = {place: 100 * value for place, value in values.items() if value is not None}
                mark, colour = marks[recovery]
                axis.plot(
                    list(seen.values()),
                    list(seen),
                    mark,
                    color=colour,
                    markersize=4,
                    linestyle="",
                    label=SHOWN[recovery],
                )
            axis.axvline(100 * arms[f"{network} unpruned"]["accuracy"], color="#444444", linewidth=0.8, linestyle=":")
            axis.set_title(f"{network}, {speedup:g}x fewer MACs", fontsize=9)
            axis.set_yticks(range(len(criteria)), criteria, fontsize=7)
            axis.grid(axis="x", linewidth=0.3)
            axis.tick_params(axis="x", labelsize=7)
        axes[row][0].invert_yaxis()
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.supxlabel("test accuracy, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
