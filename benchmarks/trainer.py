"""What our trainer costs: training with it, without methods, against a bare PyTorch loop that does the same work.

Same data order, network, optimiser, schedule, loss and look at the validation split; both end with the same bits, which
is checked. Two measurements in one process:

- steps: a step of ours and a step of the bare loop in turn, hundreds of times; the ratio that a long training tends to;
- runs: whole calls in turn, with everything that is done once a call and once an epoch.

Wall-clock and processor time, with bootstrap intervals of the median of the paired ratios: on a busy machine the latter
is the steadier.

    python benchmarks/trainer.py [--rounds 7] [--epochs 4] [--threads 1]
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from convette import _progress
from convette._files import write_json
from convette._provenance import provenance
from convette.data import Batch, ImageData, load_data
from convette.models import create_model
from convette.training import Trainer, TrainSettings, build_optimizer, train
from convette.training.optimizers import schedule_for

Times = dict[str, dict[str, list[float]]]  # "wall" or "cpu" -> who -> seconds
RESULT = Path(__file__).parent / "results" / "trainer.json"


def tiny() -> nn.Module:
    """Eight thousand weights: a step of milliseconds, where overhead shows."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def resnet20() -> nn.Module:
    """The CIFAR ResNet with 20 layers, for one channel."""
    return create_model("resnet20", num_classes=10, in_channels=1, seed=0)


# What a call costs once (10 ms: Fabric, checks) is not what a step costs: the fast network makes more steps.
NETWORKS = {"resnet20": (resnet20, 1), "two convolutions": (tiny, 5)}


class Bare:
    """The loop of `convette.train` in the fewest lines."""

    def __init__(self, network: nn.Module, data: ImageData, settings: TrainSettings) -> None:
        self.network, self.data, self.settings = network.train(), data, settings
        self.peak = settings.peak_learning_rate(settings.batch_size)
        self.schedule = schedule_for(settings, len(data.train) // settings.batch_size)
        self.optimizer = build_optimizer([network], settings, self.peak)
        self.count, self.total = 0, 0.0

    def batches(self, epoch: int) -> Iterator[Batch]:
        return self.data.train.batches(self.settings.batch_size, shuffle=True, seed=0, epoch=epoch, drop_last=True)

    def step(self, batches: Iterator[Batch]) -> None:
        batch = next(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * self.schedule(self.count)
        outputs = self.network(self.data.preprocessing(batch.images))
        loss = functional.cross_entropy(outputs, batch.labels, label_smoothing=self.settings.label_smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.item()
        self.count += 1

    def validate(self) -> int:
        self.network.eval()
        right = 0
        with torch.no_grad():
            for batch in self.data.validation.batches(256):
                outputs = self.network(self.data.preprocessing(batch.images))
                right += int((outputs.argmax(1) == batch.labels).sum())
        self.network.train()
        return right

    def run(self) -> nn.Module:
        for epoch in range(self.settings.epochs):
            batches = self.batches(epoch)
            for _ in range(len(self.data.train) // self.settings.batch_size):
                self.step(batches)
            self.validate()
        return self.network


def compare(name: str, data: ImageData, settings: TrainSettings, rounds: int) -> dict:
    """Measure steps and runs of the network `name`."""
    make, longer = NETWORKS[name]
    settings = replace(settings, epochs=settings.epochs * longer)
    steps = measure_steps(make, data, replace(settings, epochs=5 * settings.epochs, validate_every=1000))
    runs = measure_runs(make, data, settings, rounds)
    return {
        "network": name,
        "milliseconds_per_step": {who: round(1e3 * statistics.median(wall), 3) for who, wall in steps["wall"].items()},
        "steps": len(steps["wall"]["bare"]),
        "step_ratio": ratio(steps["wall"]),
        "step_cpu_ratio": ratio(steps["cpu"]),
        "epochs_per_run": settings.epochs,
        "run_ratio": ratio(runs["wall"]),
        "run_cpu_ratio": ratio(runs["cpu"]),
    }


def measure_steps(make: Callable[[], nn.Module], data: ImageData, settings: TrainSettings) -> Times:
    """Make a step of the bare loop after each step of ours, on another network; returns the seconds of each."""
    times: Times = {kind: {"bare": [], "convette": []} for kind in ("wall", "cpu")}
    other = Bare(make(), data, settings)
    theirs = itertools.chain.from_iterable(other.batches(epoch) for epoch in itertools.count())
    run_step = Trainer._run_step

    def both(trainer: Trainer, batches: Iterator[Batch]) -> None:
        timed(times, "convette", lambda: run_step(trainer, batches))
        timed(times, "bare", lambda: other.step(theirs))

    with mock.patch.object(Trainer, "_run_step", both):
        train(make(), data, settings)
    return {kind: {who: values[10:] for who, values in found.items()} for kind, found in times.items()}


def measure_runs(make: Callable[[], nn.Module], data: ImageData, settings: TrainSettings, rounds: int) -> Times:
    """Train from the start with each in turn; returns the seconds of each. The ends must be the same bits."""
    times: Times = {kind: {"bare": [], "convette": []} for kind in ("wall", "cpu")}
    for number in range(rounds):
        one, other = make(), make()
        calls = {"convette": partial(train, one, data, settings), "bare": Bare(other, data, settings).run}
        for who in list(calls) if number % 2 else list(calls)[::-1]:
            timed(times, who, calls[who])
        ends = other.state_dict()
        assert all(torch.equal(ends[key], value) for key, value in one.state_dict().items()), "not the same work"
    return times


def timed(times: Times, who: str, call: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    times["cpu"][who].append(time.process_time() - cpu)
    times["wall"][who].append(time.perf_counter() - wall)


def ratio(times: dict[str, list[float]]) -> dict:
    """Return the median of the paired ratios, its interval, and the ratios."""
    ratios = [ours / theirs for ours, theirs in zip(times["convette"], times["bare"], strict=True)]
    low, high = interval(ratios)
    return {
        "median": round(statistics.median(ratios), 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def interval(values: list[float], draws: int = 2_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    _progress.set_quiet(True)
    data = load_data("digits")
    settings = TrainSettings(
        epochs=chosen.epochs, precision="fp32", memory_format="contiguous", augmentation=(), ema_decay=None
    )
    start = time.monotonic()
    found = [compare(name, data, settings, chosen.rounds) for name in NETWORKS]
    result = {
        "what": "seconds of convette.train without methods / seconds of a bare PyTorch loop doing the same work",
        "target": "step ratio <= 1.05",
        "data": "digits, 1258 training images of 8x8, batch 128, fp32",
        "threads": chosen.threads,
        "results": found,
        **provenance(time.monotonic() - start),
    }
    write_json(RESULT, result)
    for row in found:
        print(row["network"])
        for key in ("step_ratio", "step_cpu_ratio", "run_ratio", "run_cpu_ratio"):
            print(f"  {key}: {row[key]['median']} {row[key]['interval_95']}")


if __name__ == "__main__":
    main()
