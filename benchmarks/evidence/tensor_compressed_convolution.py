"""Factorised against dense convolutions: surrogates of a 2-D wave equation.

    python benchmarks/evidence/tensor_compressed_convolution.py [--seeds 3]

Fixed before any result was seen. A network of five 3x3 convolutions of 16 channels (dilations 1, 2, 2, 1, 1) reads two
fields of a simulated wave, one step apart, on 24x24 points, and predicts the field 12 steps (6 cells) later; 640
simulations to learn from, 200 to test, 6 epochs of Adam, one cycle up to 4e-3. Dense, and with all kernels written as
sums of R one-way filters from the start. Expected from the description: the relative error of R = 2 within 1.2 times
the dense one's at about a third of the parameters, of R = 1 within 1.5 times; smaller gaps between test and training.
"""

import statistics
import time

import torch
from _figures import Figures, told, write_runs
from _work import options, over_seeds
from torch import Tensor, nn
from torch.nn import functional

from convette.cost import count
from convette.data.wave2d import wave2d
from convette.layers.convolution import compress_a_priori

SIZE, AHEAD, TRAIN, TEST = 24, 12, 640, 200
WIDTH, DILATIONS, EPOCHS, BATCH, PEAK = 16, (1, 2, 2, 1, 1), 6, 32, 4e-3


def network(rank: int | None) -> nn.Module:
    """Five convolutions with ReLU between; `rank` None: dense."""
    layers: list[nn.Module] = []
    for index, step in enumerate(DILATIONS):
        into, out = 2 if index == 0 else WIDTH, 1 if index == len(DILATIONS) - 1 else WIDTH
        conv = nn.Conv2d(into, out, 3, padding=step, dilation=step, padding_mode="replicate")
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return model if rank is None else compress_a_priori(model, rank)


@torch.no_grad()
def relative_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    found = torch.cat([model.eval()(part) for part in inputs.split(100)])
    return float((found - targets).norm() / targets.norm())


def train(model: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    steps = len(inputs) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps * EPOCHS)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=order)[: steps * BATCH].split(BATCH):
            loss = functional.mse_loss(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    seeds = options(__doc__).seeds
    started = time.monotonic()

    def run(model: nn.Module, seed: int) -> Figures:
        inputs, targets = wave2d(TRAIN + TEST, SIZE, AHEAD, seed=seed)
        begun = time.process_time()
        train(model, inputs[:TRAIN], targets[:TRAIN], seed)
        spent = time.process_time() - begun
        test = relative_error(model, inputs[TRAIN:], targets[TRAIN:])
        return {
            "relative error": test,
            "above training": test - relative_error(model, inputs[:TEST], targets[:TEST]),
            "training seconds": spent,
            "M MACs": count(model, inputs[:1]).macs / 1e6,
        }

    arms = {"dense": None, "R = 1": 1, "R = 2": 2}
    found = over_seeds({name: lambda _, rank=rank: network(rank) for name, rank in arms.items()}, seeds, run)
    mean = {name: statistics.fmean(item["relative error"] for item in runs) for name, runs in found.items()}
    times = {name: value / mean["dense"] for name, value in mean.items()}
    held = "held" if times["R = 2"] <= 1.2 and times["R = 1"] <= 1.5 else "not held"
    summary = (
        f"Fields of a simulated wave {AHEAD} steps ahead, {seeds} seeds. Error relative to dense: R = 1 "
        f"{times['R = 1']:.2f}, R = 2 {times['R = 2']:.2f} times (expected at most 1.5 and 1.2: {held})."
        f" {told(found, 'R = 2', 'dense', 'relative error', points=False)}"
    )
    settings = {"size": SIZE, "ahead": AHEAD, "train": TRAIN, "test": TEST, "width": WIDTH, "epochs": EPOCHS}
    write_runs("tensor-compressed-convolution", summary, found, started, shares=(), settings=settings)


if __name__ == "__main__":
    main()
