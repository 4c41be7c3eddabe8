"""Every criterion, at three costs, with three recoveries, on ResNets with given CIFAR-10 weights: a table, a picture.

    python benchmarks/pruning_table.py                # everything: hours on a CPU, better a GPU
    python benchmarks/pruning_table.py --networks resnet20 --recoveries none least_squares --criteria l1 fisher
    python benchmarks/pruning_table.py --page         # only the page and the picture, from the file

Every arm starts from the given weights and is cut once to the same limit on MACs (our counter for all) by the same
allocation: the same share of every layer, unless `--allocation global` is given, so that arms differ by the criterion
and the recovery alone: "none" (batch-norm statistics taken anew, as everywhere), "least_squares" (redistribution before
the cut, on the criterion's calibration images) or "distilled" (three epochs taught by the unpruned network); "both",
where it is asked for, is one after the other, as `convette prune` does it.
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
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _pruning_arms import ARMS, BOTH, DRAWN, INNER, OPTIONS, RECOVERIES, SPEEDUPS, THEIRS, key
from _pruning_page import page, picture
from _torch_pruning import their_choice, their_scores
from convette import surgery
from convette._files import write_json, write_text
from convette._progress import note
from convette._provenance import provenance
from convette.cost import Budget, WidthCost, count
from convette.data import ImageData, MemorySplit, load_data
from convette.models import create_model, known_preprocessing
from convette.pruning import (
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


def main() -> None:
    options = parse()
    if not options.page:
        fill(options)
    found = json.loads(OUT.read_text())
    write_text(
        PAGE, page(found, [json.loads(path.read_text()) for path in sorted(OUT.parent.glob(f"{OUT.stem}_*.json"))])
    )
    picture(found, PICTURE)
    note(f"written: {PAGE.name}, {PICTURE.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--criteria", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--recoveries", nargs="+", choices=[*RECOVERIES, BOTH], default=[*RECOVERIES])
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
        choose = self.inner(criterion, seed) if criterion in (*INNER, *THEIRS) else self.ours(criterion, seed)
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

    def inner(self, criterion: str, seed: int):
        """Return what stays of every inner layer of a block, by the least share that meets a limit."""
        if criterion in THEIRS:
            stream = [n for n in dict(self.parent.named_modules()) if n in ("conv1", "linear") or n.endswith(".conv2")]
            scores = their_scores(criterion, self.parent, self.example, self.calibration, stream, seed)
        else:
            name = criterion.removeprefix("inner_")
            found = score_units(name, self.parent, self.graph, self.calibration, seed=seed, options=OPTIONS.get(name))
            scores = {group: values for group, values in found.items() if group.endswith(".conv1")}

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
        if recovery in ("least_squares", BOTH):
            redistribute(network, self.graph, selection, self.calibration)
        if selection:
            surgery.apply(network, self.graph.shrink(selection))
        recalibrate(network, self.data, batches=4, seed=seed)
        if recovery in ("distilled", BOTH):
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


if __name__ == "__main__":
    main()
