"""Annealing of linear redundancy: nine tenths of an MLP's hidden units go during its training.

    python benchmarks/evidence/linear_redundancy_annealing.py [--shared ../shared/data] [--seeds 3]

Writes benchmarks/evidence/results/linear_redundancy_annealing.json. Per seed 6000 images of Fashion-MNIST, drawn by the
seed, train an MLP 784-512-512-10 for 12 epochs (batches of 64, SGD 0.05 with momentum, no augmentation); all arms begin
at the same weights and take the same steps, and what is left of each layer is the same tenth. The arms: nothing is cut;
the units of least L1 norm go at 70 % of the training; those that linear redundancy chooses go at 70 %, the rest taking
over their weights; the same criterion chooses at 30 % and they fade until 70 %. Accuracy is that on the 10,000 test
images at the end of the training. Settings were written before any result.
"""

import copy
import dataclasses
import time

import torch
from _figures import RESULTS, against, shown
from _work import options
from torch import nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.cost import count
from convette.data import ImageData, MemorySplit, load_data
from convette.pruning.methods import AnnealedRedundancy, GradualPruning
from convette.training import TrainSettings, evaluate, train

BUDGET = "parameters<=6.6%"
EPOCHS, IMAGES = 12, 6000
CUT = {"allocation": "uniform", "min_fraction": 0.05, "calibration_images": 1024}
ARMS = ("whole", "magnitude, cut", "redundancy, cut and redistributed", "redundancy, annealed")


def main() -> None:
    choices = options(__doc__, shared=True)
    began = time.monotonic()
    whole = load_data(f"parquet:{choices.shared / 'fashion-mnist'}")
    runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    parameters: dict[str, int] = {}
    for seed in range(choices.seeds):
        data = drawn(whole, seed)
        torch.manual_seed(seed)
        start = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
        for arm in ARMS:
            model = train(
                copy.deepcopy(start), data, settings(seed), methods=methods(arm, data, seed), device="cpu"
            ).model
            runs[arm].append(100 * float(evaluate(model, data.test, data.preprocessing).accuracy))
            parameters[arm] = count(model, data.preprocessing(data.train.images([0]))).parameters
            note(f"seed {seed}, {arm}: {runs[arm][-1]:.2f} %")
    fades, cut, magnitude = (runs[arm] for arm in reversed(ARMS[1:]))
    summary = (
        f"{choices.seeds} seeds, paired. Nine tenths of the hidden units gone: annealed against whole "
        f"{against(fades, runs['whole'])} points; against the same criterion cut at once and redistributed "
        f"{against(fades, cut)}; against magnitude, cut at once, {against(fades, magnitude)}."
    )
    rows = {arm: [shown(found), f"{parameters[arm]:,}"] for arm, found in runs.items()}
    body = {"summary": summary, "columns": ["test accuracy, %", "parameters"], "rows": rows, "runs": runs}
    write_json(RESULTS / "linear_redundancy_annealing.json", body | provenance(time.monotonic() - began))


def settings(seed: int) -> TrainSettings:
    return TrainSettings(
        epochs=EPOCHS,
        batch_size=64,
        learning_rate=0.05,
        label_smoothing=0.0,
        augmentation=(),
        ema_decay=None,
        precision="fp32",
        seed=seed,
    )


def methods(arm: str, data: ImageData, seed: int) -> tuple:
    if arm == "whole":
        return ()
    if arm == "magnitude, cut":
        return (GradualPruning(BUDGET, criterion="l1", begin=0.7, end=0.7, times=1, data=data, seed=seed, **CUT),)
    begin = 0.3 if arm == "redundancy, annealed" else 0.699
    return (AnnealedRedundancy(BUDGET, begin=begin, end=0.7, data=data, seed=seed, **CUT),)


def drawn(data: ImageData, seed: int) -> ImageData:
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    part = MemorySplit("train", data.train.images(chosen), data.train.labels[chosen], data.num_classes)
    few = torch.arange(1000)
    validation = MemorySplit("validation", data.validation.images(few), data.validation.labels[few], data.num_classes)
    return dataclasses.replace(data, train=part, validation=validation)


if __name__ == "__main__":
    main()
