"""Measuring latency: several runners interleaved in one run, until the medians are known well enough."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from convette.errors import UsageError
from convette.runtime.engines import Runner, as_array

KEPT_TIMINGS = 500
_BLOCK_SECONDS = 0.05
_BLOCK_CALLS = 20
_LEAST_ROUNDS = 8
_RESAMPLES = 400
_PRECISE = ("fp32", "bf16", "int8", "binary")  # most precise first


@dataclass(frozen=True)
class Latency:
    """How long a call takes, as a distribution; all times in milliseconds.

    `p50_interval` is the 95 % interval of the median. `cold_start` is the time from the model or file in hand to the
    first answer. `load_average` is that of the machine over the minute before (runnable processes). `timings` are
    at most 500 of the `samples` calls, evenly taken in the order they were made. `tail_intervals`: those of p95 and p99
    (files of before there were any have none).
    """

    engine: str
    device: str
    precision: str
    batch_size: int
    threads: int
    samples: int
    p50: float
    p95: float
    p99: float
    mean: float
    p50_interval: tuple[float, float]
    cold_start: float
    load_average: float
    timings: tuple[float, ...]
    tail_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def upper(self, percentile: str | None = None) -> float:
        """Return the upper end of the 95 % interval of `percentile` (None: p50); where none is known, its value."""
        name = percentile or "p50"
        interval = self.p50_interval if name == "p50" else self.tail_intervals.get(name, (0.0, 0.0))
        return max(float(getattr(self, name)), float(interval[1]))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self) | {
            "p50_interval": list(self.p50_interval),
            "timings": list(self.timings),
            "tail_intervals": {name: list(interval) for name, interval in self.tail_intervals.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Latency":
        """Read what `to_json` returned."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(value) | {"tail_intervals"} != fields:
            wrong = sorted((set(value) | {"tail_intervals"}) ^ fields)
            raise UsageError(f"not the JSON of a latency: {', '.join(wrong)} missing or unknown.")
        low, high = value["p50_interval"]
        tails = {name: (pair[0], pair[1]) for name, pair in value.get("tail_intervals", {}).items()}
        read = {"p50_interval": (low, high), "timings": tuple(value["timings"]), "tail_intervals": tails}
        return cls(**{**value, **read})


def measure_latency(
    runners: Mapping[str, Runner],
    example: np.ndarray | Tensor,
    *,
    time_limit: float = 5.0,
    relative_error: float = 0.02,
    minimum_samples: int = 50,
    warmup: int | None = None,
) -> dict[str, Latency]:
    """Measure how long each runner takes for `example`, all in one run so that the figures can be compared.

    The runners take turns in blocks of calls (a block begins with one untimed call, for caches and threads), in one
    order and then the reverse, so that whatever else the machine does hits all alike. It ends when every median is
    known within ``± relative_error`` (95 %, bootstrap over whole blocks, as neighbouring calls resemble each other) and
    has `minimum_samples`, or after `time_limit` seconds for each runner on average. p99 wants `minimum_samples` = 500.

    Args:
        runners: name -> runner; the names are the keys of the result.
        example: the batch to run, ``n c h w`` float.
        time_limit: seconds of measuring for each runner; one block of each is always made.
        relative_error: wanted half width of the median's interval, as a share of the median.
        minimum_samples: calls timed at least for each runner (time limit permitting).
        warmup: untimed calls before; None: until they get no faster.
    """
    return measure(
        runners,
        as_array(example),
        time_limit=time_limit,
        relative_error=relative_error,
        minimum_samples=minimum_samples,
        warmup=warmup,
        clock=time.perf_counter,
    )


def measure(
    runners: Mapping[str, Callable[[np.ndarray], Any]],
    batch: np.ndarray,
    *,
    time_limit: float,
    relative_error: float,
    minimum_samples: int,
    warmup: int | None,
    clock: Callable[[], float],
) -> dict[str, Latency]:
    """`measure_latency` on any clock."""
    if not runners:
        raise UsageError("nothing to measure: no runner was given.")
    if not (time_limit > 0 and relative_error > 0):
        raise UsageError(f"time_limit = {time_limit} and relative_error = {relative_error} must be greater than zero.")
    load = os.getloadavg()[0]
    names = list(runners)
    block = {name: _block_size(_warm_up(runners[name], batch, warmup, clock)) for name in names}
    rounds: dict[str, list[np.ndarray]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = clock() + time_limit * len(names)
        check_at = _LEAST_ROUNDS
        while True:
            for name in names if len(rounds[names[0]]) % 2 == 0 else reversed(names):
                rounds[name].append(_timed_block(runners[name], batch, block[name], clock))
            done = len(rounds[names[0]])
            if done >= check_at:
                check_at = done + max(2, done // 4)
                if all(_tight(rounds[name], relative_error, minimum_samples) for name in names):
                    break
            if clock() >= deadline:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _latency(runners[name], len(batch), np.stack(rounds[name]), load) for name in names}


def median_interval(rounds: np.ndarray, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """Return the 95 % interval of the median of ``rounds`` ("round call"), by resampling whole rounds.

    Deterministic for equal input. With fewer than five rounds: smallest and largest value.
    """
    return percentile_intervals(rounds, (50,), resamples)[0]


def percentile_intervals(
    rounds: np.ndarray, percentiles: Sequence[float | int], resamples: int = _RESAMPLES
) -> list[tuple[float, float]]:
    """Return the 95 % interval of each of `percentiles` (0 to 100), as `median_interval` finds the median's."""
    if len(rounds) < 5:
        return [(float(rounds.min()), float(rounds.max()))] * len(percentiles)
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(rounds), size=(resamples, len(rounds)))
    found = np.percentile(rounds[picks].reshape(resamples, -1), percentiles, axis=1)
    ends = np.percentile(found, [2.5, 97.5], axis=1)
    values = np.percentile(rounds, percentiles)
    return [(min(float(a), float(v)), max(float(b), float(v))) for a, b, v in zip(*ends, values, strict=True)]


def _warm_up(
    runner: Callable[[np.ndarray], Any], batch: np.ndarray, calls: int | None, clock: Callable[[], float]
) -> float:
    """Call until calls get no faster (at least 3, at most 30 calls or about a second); return the best time."""
    best, since_better, total = float("inf"), 0, 0.0
    for done in range(1, (calls or 30) + 1):
        start = clock()
        runner(batch)
        seconds = clock() - start
        total += seconds
        since_better = 0 if seconds < 0.95 * best else since_better + 1
        best = min(best, seconds)
        if calls is None and done >= 3 and (since_better >= 3 or total > 1.0):
            break
    return best


def _block_size(seconds: float) -> int:
    return int(np.clip(_BLOCK_SECONDS / max(seconds, 1e-9), 1, _BLOCK_CALLS))


def _timed_block(
    runner: Callable[[np.ndarray], Any], batch: np.ndarray, calls: int, clock: Callable[[], float]
) -> np.ndarray:
    runner(batch)
    timings = np.empty(calls)
    for index in range(calls):
        start = clock()
        runner(batch)
        timings[index] = clock() - start
    return timings * 1e3


def _tight(rounds: list[np.ndarray], relative_error: float, minimum_samples: int) -> bool:
    timings = np.stack(rounds)
    if timings.size < minimum_samples:
        return False
    low, high = median_interval(timings)
    return (high - low) / 2 <= relative_error * float(np.median(timings))


def _latency(runner: Any, batch_size: int, rounds: np.ndarray, load: float) -> Latency:
    timings = rounds.ravel()
    p50, p95, p99 = (float(value) for value in np.percentile(timings, [50, 95, 99]))
    middle, *tails = percentile_intervals(rounds, (50, 95, 99))
    kept = timings[np.linspace(0, timings.size - 1, min(timings.size, KEPT_TIMINGS)).round().astype(int)]
    return Latency(
        engine=runner.engine,
        device=runner.device,
        precision=runner.precision,
        batch_size=batch_size,
        threads=runner.threads,
        samples=timings.size,
        p50=p50,
        p95=p95,
        p99=p99,
        mean=float(timings.mean()),
        p50_interval=middle,
        cold_start=runner.cold_start_seconds * 1e3,
        load_average=load,
        timings=tuple(round(float(value), 6) for value in kept),
        tail_intervals=dict(zip(("p95", "p99"), tails, strict=True)),
    )


@dataclass(frozen=True)
class Choice:
    """The engine to use, and why, in one sentence."""

    name: str
    reason: str


def fastest(
    latencies: Mapping[str, Latency],
    accuracies: Mapping[str, float] | None = None,
    *,
    max_accuracy_drop: float = 0.01,
    reference: str | None = None,
) -> Choice:
    """Name the fastest of `latencies` (by median) that is accurate enough, with the reason.

    Accurate enough: `accuracies` (shares, 0..1) at most `max_accuracy_drop` below that of `reference` (None: below the
    best). Without accuracies all are taken to be. Of those that cannot be told apart from the fastest (the intervals of
    the medians overlap) the one with the highest precision is named. Raises `UsageError` if nothing was measured,
    none is accurate enough, or `accuracies` misses a name.
    """
    if not latencies:
        raise UsageError("nothing to choose from: no latency was measured.")
    names = sorted(latencies, key=lambda name: latencies[name].p50)
    lost = _losses(names, accuracies, reference)
    allowed = [name for name in names if lost[name] <= max_accuracy_drop + 1e-12]
    if not allowed:
        raise UsageError(f"none is within {max_accuracy_drop:.2%} of the accuracy of {reference}; allow a larger drop.")
    equal = [name for name in allowed if overlap(latencies[allowed[0]], latencies[name])]
    name = min(equal, key=lambda name: _PRECISE.index(latencies[name].precision))
    reason = f"{name} is the fastest ({latencies[name].p50:.3g} ms)"
    if accuracies is not None:
        reason += f" within {100 * max_accuracy_drop:.3g} points of accuracy ({100 * accuracies[name]:.2f} %)"
    faster = [other for other in names[: names.index(allowed[0])] if other not in allowed]
    if faster:
        reason += "; " + ", ".join(
            f"{other} is faster ({latencies[other].p50:.3g} ms) but loses {100 * lost[other]:.2f} points"
            for other in faster
        )
    equal.remove(name)
    if equal:
        more = (
            " and no more precise"
            if any(latencies[other].precision != latencies[name].precision for other in equal)
            else ""
        )
        reason += f"; {', '.join(equal)} cannot be told apart from it in speed{more}"
    return Choice(name, reason + ".")


def _losses(names: list[str], accuracies: Mapping[str, float] | None, reference: str | None) -> dict[str, float]:
    if accuracies is None:
        return dict.fromkeys(names, 0.0)
    missing = [name for name in (*names, *([reference] if reference else [])) if name not in accuracies]
    if missing:
        raise UsageError(f"no accuracy is known for {', '.join(missing)}; measure it, or give none at all.")
    best = accuracies[reference] if reference else max(accuracies[name] for name in names)
    return {name: best - accuracies[name] for name in names}


def overlap(one: Latency, other: Latency) -> bool:
    """Return whether the intervals of two medians overlap: which one is faster is then not known."""
    return one.p50_interval[0] <= other.p50_interval[1] and other.p50_interval[0] <= one.p50_interval[1]
