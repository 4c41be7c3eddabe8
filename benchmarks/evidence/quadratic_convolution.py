"""A quadratic first layer against a linear one of the same width, and against a linear network of the same size.

    python benchmarks/evidence/quadratic_convolution.py [--seeds 3]

Fixed before any result was seen. 4,000 USPS digits for training, all 2,007 test digits; three 3x3 convolutions of 8
filters, each with a batch norm and an activation (ELU behind quadratic ones, ReLU behind linear ones, as in the paper),
two poolings, global average pooling, linear; 8 epochs. The first convolution is linear, a full quadratic form, or of
rank 1 (ours, not the paper's); "linear, wider" has the parameters of the full form's network.
Expected: 1 to 4 points over the linear network of the same width, parity with the one of the same size.
"""

import time

import torch
import torch.nn.functional as F
from _figures import told, write_runs
from _work import accuracy, images_of, load, options, over_seeds, train
from torch import nn

from convette.layers.convolution import QuadraticConv2d

TRAIN, EPOCHS, WIDTH = 4000, 8, 8


def network(first: str, width: int = WIDTH) -> nn.Module:
    ranks = {"full": None, "rank 1": 1}
    stem: nn.Module = nn.Conv2d(1, width, 3, padding=1)
    if first in ranks:
        stem = QuadraticConv2d(1, width, 3, padding=1, rank=ranks[first])
    layers = [stem, nn.BatchNorm2d(width), nn.ELU() if first in ranks else nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    arguments = options(__doc__, shared=True)
    started = time.monotonic()
    data = load("usps", arguments.shared)
    inputs, targets = images_of(data, "train")
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:TRAIN]
    inputs, targets = inputs[chosen] * 2 - 1, targets[chosen]
    test, wanted = images_of(data, "test")
    test = test * 2 - 1
    goal = size(network("full"))
    wider = min(range(WIDTH, 3 * WIDTH), key=lambda width: abs(size(network("linear", width)) - goal))

    def run(model: nn.Module, seed: int) -> dict[str, float]:
        train(model, inputs, targets, F.cross_entropy, epochs=EPOCHS, seed=seed)
        return {"accuracy": accuracy(model, test, wanted)}

    arms = {
        "linear": lambda seed: network("linear"),
        "linear, wider": lambda seed: network("linear", wider),
        "quadratic": lambda seed: network("full"),
        "quadratic, rank 1": lambda seed: network("rank 1"),
    }
    found = over_seeds(arms, arguments.seeds, run)
    summary = (
        f"{TRAIN} USPS digits, three convolutions of {WIDTH} filters, the first quadratic or not. "
        + told(found, "quadratic", "linear", "accuracy")
        + " "
        + told(found, "quadratic", "linear, wider", "accuracy")
    )
    settings = {"train": TRAIN, "epochs": EPOCHS, "seeds": arguments.seeds, "width": WIDTH, "wider": wider}
    write_runs("quadratic-convolution", summary, found, started, shares=("accuracy",), settings=settings)


if __name__ == "__main__":
    main()
