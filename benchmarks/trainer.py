"""What our trainer costs: training with it, without methods, against a bare PyTorch loop that does the same work.

Same data order, network, optimiser, schedule, loss and look at the validation split; both end with the same bits, which
is checked. Runs alternate in one process; the figures are the ratio of their times and that of their processor times
(which a busy machine disturbs less), with bootstrap intervals.

    python benchmarks/trainer.py [--rounds 15] [--epochs 4] [--threads 1]
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from convette import _progress
from convette._files import write_json
from convette._provenance import provenance
from convette.data import ImageData, load_data
from convette.models import create_model
from convette.training import TrainSettings, build_optimizer, train
from convette.training.optimizers import schedule_for

RESULT = Path(__file__).parent / "results" / "trainer.json"


def tiny() -> nn.Module:
    """Eight thousand weights: a step of milliseconds, where overhead shows."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


NETWORKS = {
    "resnet20": lambda: create_model("resnet20", num_classes=10, in_channels=1, seed=0),
    "two convolutions": tiny,
}


def bare(network: nn.Module, data: ImageData, settings: TrainSettings) -> nn.Module:
    """Train as `convette.train` does, in the fewest lines."""
    steps = len(data.train) // settings.batch_size
    peak, schedule = settings.peak_learning_rate(settings.batch_size), schedule_for(settings, steps)
    optimizer = build_optimizer([network], settings, peak)
    step = 0
    for epoch in range(settings.epochs):
        network.train()
        total = 0.0
        batches = data.train.batches(settings.batch_size, shuffle=True, seed=0, epoch=epoch, drop_last=True)
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step)
            outputs = network(data.preprocessing(batch.images))
            loss = functional.cross_entropy(outputs, batch.labels, label_smoothing=settings.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
        network.eval()
        right = 0
        with torch.no_grad():
            for batch in data.validation.batches(256):
                right += int((network(data.preprocessing(batch.images)).argmax(1) == batch.labels).sum())
    return network


def compare(name: str, data: ImageData, settings: TrainSettings, rounds: int) -> dict:
    """Time both in turn; returns the seconds of each and their ratio."""
    runs = {"bare": lambda net: bare(net, data, settings), "convette": lambda net: train(net, data, settings).model}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    processor: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        ends = {}
        order = list(runs) if number % 2 else list(runs)[::-1]
        for key in order:
            torch.manual_seed(0)
            network = NETWORKS[name]()
            start, begun = time.perf_counter(), time.process_time()
            ends[key] = runs[key](network).state_dict()
            if number > 0:  # the first is warm-up
                seconds[key].append(time.perf_counter() - start)
                processor[key].append(time.process_time() - begun)
        assert all(torch.equal(ends["bare"][k], v) for k, v in ends["convette"].items()), "not the same work"
    steps = settings.epochs * (len(data.train) // settings.batch_size)
    return {
        "network": name,
        "steps": steps,
        "milliseconds_per_step_bare": round(1e3 * statistics.median(seconds["bare"]) / steps, 3),
        "milliseconds_per_step_convette": round(1e3 * statistics.median(seconds["convette"]) / steps, 3),
        "ratio": ratio(seconds),
        "cpu_ratio": ratio(processor),
    }


def ratio(times: dict[str, list[float]]) -> dict:
    """Return the median of the paired ratios, its interval, and the ratios."""
    ratios = [ours / theirs for ours, theirs in zip(times["convette"], times["bare"], strict=True)]
    low, high = interval(ratios)
    return {
        "median": round(statistics.median(ratios), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "all": [round(value, 3) for value in ratios],
    }


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15)
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
        "target": "ratio <= 1.05",
        "data": "digits, 1258 training images of 8x8, batch 128, fp32",
        "threads": chosen.threads,
        "results": found,
        **provenance(time.monotonic() - start),
    }
    write_json(RESULT, result)
    for row in found:
        wall, cpu = row["ratio"], row["cpu_ratio"]
        print(
            f"{row['network']}: {row['milliseconds_per_step_bare']} ms a step, ratio {wall['median']} "
            f"{wall['interval_95']}, of processor time {cpu['median']} {cpu['interval_95']}"
        )


if __name__ == "__main__":
    main()
