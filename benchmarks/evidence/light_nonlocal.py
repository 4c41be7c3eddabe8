"""LightNL on a task that needs two far places at once: are these two digits of the same class?

    python benchmarks/evidence/light_nonlocal.py [--seeds 3]

Fixed before any result was seen. Two scikit-learn digits (8 px) lie at random heights at the left and the right end of
a canvas of 12 x 36 px, at least 16 px apart; half of the canvases show one class twice. A network of inverted residuals
with a receptive field of 19 px ends in global average pooling: it sees both digits, but never one beside the other.
3,000 canvases of training digits, 1,000 of test digits, 8 epochs. With and without one LightNL layer (all channels
compared, stride 1) behind the last projection. (A larger setting, 40 px and 6,000 canvases, was given up after one run
without the layer, at chance, because a run took over a minute of CPU.) Expected: three to fifteen points more with it.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _layers import accuracy, images_of, load, over_seeds, told, train, write
from torch import Tensor, nn

from convette.layers.attention import LightNonLocal2d

TRAIN, TEST, EPOCHS, HEIGHT, WIDTH = 3000, 1000, 8, 12, 36


def canvases(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == k).flatten() for k in range(10)]
    same = torch.arange(count) % 2
    result = torch.zeros(count, 1, HEIGHT, WIDTH)
    for i in range(count):
        first = int(torch.randint(10, (), generator=generator))
        second = first if same[i] else (first + 1 + int(torch.randint(9, (), generator=generator))) % 10
        for label, left in ((first, 0), (second, 26)):
            x = left + int(torch.randint(3, (), generator=generator))
            y = int(torch.randint(5, (), generator=generator))
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
        "with LightNL": lambda seed: network(True),
    }
    found = over_seeds(arms, arguments.seeds, run)
    summary = "Same class or not, of two digits far apart (scikit-learn digits on canvases of 12 x 36 px). " + told(
        found, "with LightNL", "without", "accuracy"
    )
    settings = {"train": TRAIN, "test": TEST, "epochs": EPOCHS, "seeds": arguments.seeds}
    write("light-nonlocal", summary, found, started, shares=("accuracy",), settings=settings)


if __name__ == "__main__":
    main()
