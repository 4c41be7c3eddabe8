"""LightNL on a task that needs two far places at once: are these two digits of the same class?

    python benchmarks/evidence/light_nonlocal.py [--seeds 3]

Fixed before any result was seen. Two scikit-learn digits (8 px) lie at random heights at the left and the right
edge of a 40 px canvas, at least 16 px apart; half of the canvases show one class twice. A network of inverted
residuals with a receptive field of 19 px ends in global average pooling: it sees both digits, but never one
beside the other. 6,000 canvases of training digits, 2,000 of test digits, 10 epochs. With and without one LightNL layer
(all channels compared, stride 1) behind the last projection; and with a wider network of more parameters in its place.
Expected: three to fifteen points more with it.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _layers import accuracy, images_of, load, over_seeds, told, train, write
from torch import Tensor, nn

from convette.layers.attention import LightNonLocal2d

TRAIN, TEST, EPOCHS, SIDE = 6000, 2000, 10, 40


def canvases(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == k).flatten() for k in range(10)]
    same = torch.arange(count) % 2
    result = torch.zeros(count, 1, SIDE, SIDE)
    for i in range(count):
        first = int(torch.randint(10, (), generator=generator))
        second = first if same[i] else (first + 1 + int(torch.randint(9, (), generator=generator))) % 10
        for label, left in ((first, 0), (second, 28)):
            x, y = (
                left + int(torch.randint(5, (), generator=generator)),
                int(torch.randint(33, (), generator=generator)),
            )
            chosen = members[label][int(torch.randint(len(members[label]), (), generator=generator))]
            result[i, 0, y : y + 8, x : x + 8] = images[chosen, 0]
    return result, same


def inverted(inside: int, outside: int, stride: int) -> list[nn.Module]:
    wide = 3 * inside
    return [
        *(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside)),
    ]


def network(nonlocal_layer: bool, width: int = 16) -> nn.Module:
    layers = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
    layers += [*inverted(width, width, 1), *inverted(width, 2 * width, 2), *inverted(2 * width, 2 * width, 1)]
    if nonlocal_layer:
        layers.append(LightNonLocal2d(2 * width, 1.0))
    layers += [nn.Conv2d(2 * width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    data = load("digits", arguments.shared)
    inputs, targets = canvases(*images_of(data, "train"), TRAIN, 0)
    test = canvases(*images_of(data, "test"), TEST, 1)

    def run(model: nn.Module, seed: int) -> dict[str, float]:
        train(model, inputs, targets, F.cross_entropy, epochs=EPOCHS, seed=seed)
        return {"accuracy": accuracy(model, *test)}

    arms = {
        "without": lambda seed: network(False),
        "without, wider": lambda seed: network(False, 20),
        "with LightNL": lambda seed: network(True),
    }
    found = over_seeds(arms, arguments.seeds, run)
    summary = (
        "Same class or not, of two digits far apart (scikit-learn digits, 40 px canvases). "
        + told(found, "with LightNL", "without", "accuracy")
        + " "
        + told(found, "with LightNL", "without, wider", "accuracy")
    )
    settings = {"train": TRAIN, "test": TEST, "epochs": EPOCHS, "seeds": arguments.seeds}
    write("light-nonlocal", summary, found, started, shares=("accuracy",), settings=settings)


if __name__ == "__main__":
    main()
