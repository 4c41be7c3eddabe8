"""Higher-order operations against temporal convolutions: which way does the marked digit move?

    python benchmarks/evidence/higher_order_operations.py [--seeds 3]

Synthetic motion of real digits, no action recognition. Fixed before any result was seen. Two of scikit-learn's digits
(6x6 of their 8x8 pixels) move over a 20x20 canvas for 6 frames, 2 pixels a frame, in two different of four directions;
the label is the direction of the zero, the other digit is none. The middle of a path does not depend on its direction,
so no single frame tells it. 1,000 clips to learn from, 500 to test, of other digits; 6 epochs. A small network per
frame (16 channels) with nothing, one residual 3x3x3 convolution, or one higher-order block before pooling over space
and time. Expected: nothing below .4, the block above .9, with under half of the convolution's parameters.
"""

import time

import torch
from _figures import Figures, told, write_runs
from _work import accuracy, all_digits, options, over_seeds, train
from torch import Tensor, nn
from torch.nn import functional

from convette.layers.attention import HigherOrderBlock

CLIPS, TEST, FRAMES, SIDE, DIGIT, SPEED = 1000, 500, 6, 20, 6, 2
CHANNELS, EPOCHS = 16, 6
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def clips(count: int, digits: Tensor, classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips (n, 1, t, h, w) in 0 .. 1 and the direction of their zero."""
    zeros, others = digits[classes == 0], digits[classes != 0]
    videos, labels = torch.zeros(count, FRAMES, SIDE, SIDE), torch.zeros(count, dtype=torch.int64)
    reach = SPEED * (FRAMES - 1) // 2
    room = SIDE - DIGIT - 2 * reach

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    for n in range(count):
        ways = torch.randperm(4, generator=generator)[:2].tolist()
        labels[n] = ways[0]
        for ink, way in ((zeros[draw(len(zeros))], ways[0]), (others[draw(len(others))], ways[1])):
            top, left = reach + draw(room + 1), reach + draw(room + 1)
            for frame in range(FRAMES):
                shift = SPEED * frame - reach
                row, column = top + DIRECTIONS[way][0] * shift, left + DIRECTIONS[way][1] * shift
                area = videos[n, frame, row : row + DIGIT, column : column + DIGIT]
                area.copy_(torch.maximum(area, ink))
    return videos[:, None], labels


class Convolution(nn.Module):
    """A residual 3x3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class Network(nn.Module):
    """Two convolutions a frame, the operation under test, the mean over time and space, linear."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        frame = (1, 3, 3)
        self.stem = nn.Sequential(
            nn.Conv3d(1, CHANNELS, frame, (1, 2, 2), (0, 1, 1), bias=False),
            nn.BatchNorm3d(CHANNELS),
            nn.ReLU(),
            nn.Conv3d(CHANNELS, CHANNELS, frame, 1, (0, 1, 1), bias=False),
            nn.BatchNorm3d(CHANNELS),
            nn.ReLU(),
        )
        self.operation = operation
        self.head = nn.Linear(CHANNELS, len(DIRECTIONS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self.stem(x)).relu().mean((2, 3, 4)))


def main() -> None:
    seeds = options(__doc__).seeds
    started = time.monotonic()
    digits, classes = all_digits()
    digits = digits[:, 0, 1:7, 1:7]

    def run(model: nn.Module, seed: int) -> Figures:
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = clips(CLIPS, digits[:1200], classes[:1200], generator)
        test, wanted = clips(TEST, digits[1200:], classes[1200:], generator)
        train(model, inputs, targets, functional.cross_entropy, epochs=EPOCHS, seed=seed, batch=50)
        parameters = sum(p.numel() for p in model.operation.parameters())  # type: ignore[union-attr]
        return {"accuracy": accuracy(model, test, wanted), "of which the operation": parameters}

    arms = {
        "nothing": lambda _: Network(nn.Identity()),
        "3x3x3 convolution": lambda _: Network(Convolution()),
        "higher-order block": lambda _: Network(HigherOrderBlock(CHANNELS, (3, 3, 3))),
    }
    found = over_seeds(arms, seeds, run)
    mean = {name: sum(item["accuracy"] for item in runs) / seeds for name, runs in found.items()}
    held = mean["nothing"] < 0.4 and mean["higher-order block"] > 0.9
    summary = (
        f"Direction of a marked digit among two, synthetic motion, {seeds} seeds; chance is 25 %. Expected nothing"
        f" below 40 % and the block above 90 %: {'held' if held else 'not held'}."
        f" {told(found, 'higher-order block', '3x3x3 convolution', 'accuracy')}"
    )
    settings = {"clips": CLIPS, "test": TEST, "epochs": EPOCHS, "channels": CHANNELS}
    write_runs("higher-order-operations", summary, found, started, shares=("accuracy",), settings=settings)


if __name__ == "__main__":
    main()
