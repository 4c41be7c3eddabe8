"""Which blocks of a trained ResNet-20 can be left out: by information, by what the loss says, by chance, and the worst.

    python benchmarks/layer_removal.py

Writes benchmarks/results/layer_removal.json. The given CIFAR-10 weights; three of the seven blocks that keep their
shape are removed one after another, scores taken anew after each (256 training images), batch-norm statistics taken
anew, no training. Accuracy on the 1,000 original test images. Fixed before any result: expected is that information
beats the mean of five random choices by 5 to 20 points, and that the most informative blocks, removed instead, do worse
than that mean.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import load_data
from convette.models import create_model, known_preprocessing
from convette.pruning import layer_information, recalibrate
from convette.surgery import apply, removable, remove
from convette.training import evaluate

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
OUT = Path(__file__).parent / "results" / "layer_removal.json"
REMOVED = 3


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    parent = create_model("resnet20", weights=SHARED / "cifar10-resnet" / "resnet20.safetensors").eval()
    mean, std = known_preprocessing(parent)  # type: ignore[misc]
    data = load_data(f"parquet:{SHARED / 'cifar10-lossless'}", mean=mean, std=std)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    batch = next(iter(data.train.batches(256, shuffle=True, seed=0)))
    batches = [(data.preprocessing(batch.images), batch.labels)]

    def scores(network: nn.Module, how: str, names: tuple[str, ...], draw: torch.Generator) -> dict[str, float]:
        if how.startswith("random"):
            return dict(zip(names, torch.rand(len(names), generator=draw).tolist(), strict=True))
        measure, _, rule = how.removeprefix("most ").partition(" ")
        found = layer_information(network, names, batches, measure=measure, rule=rule or "value")
        return {name: -value for name, value in found.items()} if how.startswith("most ") else found

    def without(how: str) -> dict[str, object]:
        network, gone = copy.deepcopy(parent), []
        draw = torch.Generator().manual_seed(int(how.rpartition(" ")[2]) if how.startswith("random") else 0)
        for _ in range(REMOVED):
            names = tuple(name for name in removable(network, example) if name not in gone)
            price = scores(network, how, names, draw)
            gone.append(min(price, key=price.__getitem__))
            apply(network, remove(network, gone[-1], example))
        recalibrate(network, data, batches=4)
        accuracy = evaluate(network, data.test, data.preprocessing).accuracy
        note(f"{how}: {gone}, {accuracy:.3f}")
        return {"removed": gone, "accuracy": accuracy}

    ways = ["renyi", "renyi gain", "energy", "energy gain", "most renyi", *(f"random {seed}" for seed in range(5))]
    arms = {how: without(how) for how in ways}
    chance = [float(arms[f"random {seed}"]["accuracy"]) for seed in range(5)]  # type: ignore[arg-type]
    result = {
        "what": "ResNet-20, given CIFAR-10 weights, without three of seven blocks, no training; 1,000 test images",
        "unpruned": evaluate(parent, data.test, data.preprocessing).accuracy,
        "random_mean": statistics.fmean(chance),
        "arms": arms,
        **provenance(time.perf_counter() - started),
    }
    write_json(OUT, result)


if __name__ == "__main__":
    main()
