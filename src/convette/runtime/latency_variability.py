"""Latency variability: inference time as a distribution under background load (arXiv 2003.00138).

A network that is faster on an idle machine can be slower on a busy one. So latency is measured under declared
conditions, orders between networks are tested in each, and budgets use quantiles: ``latency.p99<=3ms`` measured under
`contention`.

Source: L. Yang, B. Lu, S. Ren, A Note on Latency Variability of Deep Neural Networks for Mobile Inference, 2020. The
paper gives findings; protocol and statistics here are ours.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from convette.errors import UsageError
from convette.runtime._load import Contention, contention
from convette.runtime.engines import Runner, as_array

BLOCK = 20  # calls of one runner in a row; also the block of the bootstrap, as neighbouring calls resemble each other


# Measuring ------------------------------------------------------------------------------------------------------------


def sample(
    runners: Mapping[str, Runner | Callable[[np.ndarray], Any]],
    example: np.ndarray | Tensor,
    *,
    samples: int = 500,
    warmup: int = 20,
    period: float | int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, np.ndarray]:
    """Time `samples` single calls of each runner, in milliseconds, in blocks of 20 in the order A B B A.

    The interleaving lets whatever else the machine does hit all alike. `period` None: calls back to back; else a call
    is due every `period` seconds, as from a camera, and its time counts from when it was due (queueing counts). No
    garbage is collected meanwhile. Raises `UsageError` without runners.
    """
    if not runners:
        raise UsageError("nothing to measure: no runner was given.")
    if samples < 1:
        raise UsageError(f"samples = {samples}: at least 1 is needed; p99 wants 500.")
    batch, names = as_array(example), list(runners)
    for name in names:
        for _ in range(warmup):
            runners[name](batch)
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        turn = 0
        while len(found[names[0]]) < samples:
            calls = min(BLOCK, samples - len(found[names[0]]))
            for name in names if turn % 2 == 0 else reversed(names):
                found[name] += _block(runners[name], batch, calls, period, clock, sleep)
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: 1e3 * np.array(times) for name, times in found.items()}


def _block(
    runner: Callable[[np.ndarray], Any],
    batch: np.ndarray,
    calls: int,
    period: float | None,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[float]:
    runner(batch)  # untimed: caches and threads of the one before
    times = []
    due = clock()
    for _ in range(calls):
        start = clock()
        if period is not None:
            if start < due:
                sleep(due - start)
            start, due = due, due + period
        runner(batch)
        times.append(clock() - start)
    return times


# Statistics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    r"""What `samples` times (milliseconds) say: quantiles, spread, tail, drift.

    `cv` :math:`= s/m`, `qcd` :math:`= (Q_3 - Q_1)/(Q_3 + Q_1)`, `tail` :math:`= p_{99}/p_{50}`, `drift` the median of
    the last third over that of the first. `intervals`: 95 %, of p50, p95 and p99, by a bootstrap over blocks of 20.
    """

    samples: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    least: float
    sd: float
    cv: float
    qcd: float
    tail: float
    drift: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self.__dict__, "intervals": {name: list(pair) for name, pair in self.intervals.items()}}


def spread(times: np.ndarray, *, resamples: int = 400, seed: int = 0) -> Spread:
    """Return the statistics of `times`. p99 of fewer than 500 is little more than the largest."""
    times = np.asarray(times, dtype=float)
    q1, p50, q3, p90, p95, p99 = (float(value) for value in np.percentile(times, [25, 50, 75, 90, 95, 99]))
    mean, sd = float(times.mean()), float(times.std(ddof=1)) if len(times) > 1 else 0.0
    third = max(1, len(times) // 3)
    return Spread(
        samples=len(times),
        mean=mean,
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        least=float(times.min()),
        sd=sd,
        cv=sd / mean if mean else 0.0,
        qcd=(q3 - q1) / (q3 + q1) if q3 + q1 else 0.0,
        tail=p99 / p50 if p50 else 0.0,
        drift=float(np.median(times[-third:]) / max(float(np.median(times[:third])), 1e-12)),
        intervals={
            f"p{q}": bootstrap(times, lambda part, q=q: np.percentile(part, q, axis=1), resamples=resamples, seed=seed)
            for q in (50, 95, 99)
        },
    )


def bootstrap(
    times: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    block: int = BLOCK,
    level: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the `level` interval of ``statistic(resampled "resample time")`` by resampling whole blocks of `times`."""
    times = np.asarray(times, dtype=float)
    size = min(block, len(times))
    starts = np.random.default_rng(seed).integers(
        0, len(times) - size + 1, size=(resamples, math.ceil(len(times) / size))
    )
    picked = (starts[:, :, None] + np.arange(size)).reshape(resamples, -1)[:, : len(times)]
    low, high = np.percentile(statistic(times[picked]), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def miss_rate(times: np.ndarray, deadline: float | int) -> float:
    """Return the share of `times` above `deadline` (both milliseconds)."""
    return float((np.asarray(times) > deadline).mean())


def probability_faster(one: np.ndarray, other: np.ndarray) -> float:
    r"""Return how likely a random time of `one` is below one of `other`; ties are counted apart.

    .. math:: P(A < B) = U / (n_A n_B)

    with Mann and Whitney's U without ties: :math:`P(A<B) + P(B<A) + P(A=B) = 1`.
    """
    ordered = np.sort(np.asarray(other, dtype=float))
    above = len(ordered) - np.searchsorted(ordered, np.asarray(one, dtype=float), side="right")
    return float(above.mean() / len(ordered))


def median_difference(
    one: np.ndarray, other: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the `level` interval of median(one) - median(other), resampling the blocks of both together.

    Taken together because they were measured in turns: what the machine did to one block it did to its neighbour.
    """
    count = min(len(one), len(other))
    pairs = np.stack([np.asarray(one, float)[:count], np.asarray(other, float)[:count]], axis=1)
    size = min(BLOCK, count)
    starts = np.random.default_rng(seed).integers(0, count - size + 1, size=(resamples, math.ceil(count / size)))
    picked = pairs[(starts[:, :, None] + np.arange(size)).reshape(resamples, -1)[:, :count]]
    medians = np.median(picked, axis=1)
    low, high = np.percentile(medians[:, 0] - medians[:, 1], [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def kendall_tau(one: Sequence[float | int], other: Sequence[float | int]) -> float:
    """Return Kendall's rank correlation of two rankings: 1 the same order, -1 the opposite; 1 for fewer than two."""
    from scipy.stats import kendalltau

    if len(one) < 2:
        return 1.0
    value = float(kendalltau(one, other)[0])  # type: ignore[arg-type]
    return value if math.isfinite(value) else 1.0


# Studies --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reversal:
    """Two networks whose order differs: `faster` is faster in `first` but slower in `second` (95 % intervals)."""

    faster: str
    slower: str
    first: str
    second: str


@dataclass(frozen=True)
class VariabilityStudy:
    """Times of each network in each condition, and what they say of their order.

    `times`: condition -> network -> milliseconds; `achieved`: condition -> processor seconds per second the background
    load got; `load_average`: that of the machine before each condition; `threads`: those of the runners.
    """

    times: Mapping[str, Mapping[str, np.ndarray]]
    achieved: Mapping[str, float]
    load_average: Mapping[str, float]
    threads: int

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions, in the order measured."""
        return tuple(self.times)

    def spread(self, condition: str, network: str) -> Spread:
        """Return the statistics of one network in one condition."""
        return spread(self.times[condition][network])

    def slowdown(self, network: str) -> dict[str, float]:
        """Return the median in each condition over that in the first."""
        first = float(np.median(next(iter(self.times.values()))[network]))
        return {name: float(np.median(found[network])) / first for name, found in self.times.items()}

    def rank_correlation(self) -> dict[str, float]:
        """Return Kendall's tau of the networks' medians between the first condition and each."""
        rank = {name: [float(np.median(x)) for x in found.values()] for name, found in self.times.items()}
        return {name: kendall_tau(rank[self.conditions[0]], medians) for name, medians in rank.items()}

    def reversals(self, level: float = 0.95) -> tuple[Reversal, ...]:
        """Return the pairs whose median differences lie on opposite sides of 0 in two conditions (`level` intervals).

        With many pairs and conditions the level is shared out among them (Bonferroni), so that identical networks are
        called reversed in at most ``1 - level`` of all studies.
        """
        networks = list(next(iter(self.times.values())))
        pairs = [(a, b) for index, a in enumerate(networks) for b in networks[index + 1 :]]
        level = 1 - (1 - level) / max(1, len(pairs) * len(self.times))
        found = []
        for one, other in pairs:
            signs = {}
            for name, times in self.times.items():
                low, high = median_difference(times[one], times[other], level=level)
                signs[name] = -1 if high < 0 else 1 if low > 0 else 0
            first = next((name for name, sign in signs.items() if sign), None)
            for name, sign in signs.items():
                if first is not None and sign == -signs[first]:
                    faster, slower = (one, other) if signs[first] < 0 else (other, one)
                    found.append(Reversal(faster, slower, first, name))
        return tuple(found)

    def robust_cost(
        self,
        network: str,
        percentile: float | int = 95,
        weights: Mapping[str, float | int] | None = None,
        *,
        kappa: float | int | None = None,
    ) -> float:
        r"""Return the percentile of `network` in its worst condition, or (with `weights`) the mean over a declared mix.

        `kappa`: :math:`m + \kappa s` of each condition (mean and standard deviation) in the place of the percentile.
        Raises `UsageError` if the weights do not name the conditions or do not add up to 1.
        """

        def value(times: np.ndarray) -> float:
            if kappa is None:
                return float(np.percentile(times, percentile))
            one = spread(times, resamples=1)
            return one.mean + float(kappa) * one.sd

        values = {name: value(found[network]) for name, found in self.times.items()}
        if weights is None:
            return max(values.values())
        if set(weights) != set(values) or abs(sum(weights.values()) - 1) > 1e-9:
            raise UsageError(f"weights must name {', '.join(values)} and add up to 1.")
        return sum(weights[name] * value for name, value in values.items())

    def common_slowdown(self, condition: str) -> tuple[float, float]:
        r"""Return :math:`\mu, \sigma` of a lognormal factor common to all networks in `condition`.

        Quantiles do not add over layers, so a network's time in a condition is modelled as
        :math:`T = F \sum_i \mu_i` with idle means :math:`\mu_i` and :math:`\ln F \sim N(\mu, \sigma^2)`.
        """
        first = self.times[self.conditions[0]]
        logs = np.concatenate([np.log(x / first[name].mean()) for name, x in self.times[condition].items()])
        return float(logs.mean()), float(logs.std(ddof=1))

    def predicted(self, idle: float | int, condition: str, percentile: float | int = 95) -> float:
        r"""Return the percentile in `condition` of a network whose mean on an idle machine is `idle` milliseconds.

        .. math:: T_q = \Bigl(\sum_i \mu_i\Bigr) \exp(\mu + z_q \sigma)

        with :math:`\mu, \sigma` of `common_slowdown`: for networks that were not measured under load, from a table of
        idle layer times.
        """
        from scipy.stats import norm

        mu, sigma = self.common_slowdown(condition)
        return float(idle) * math.exp(mu + float(norm.ppf(percentile / 100)) * sigma)

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as plain JSON values (not the single times)."""
        return {
            "conditions": {
                name: {
                    "achieved": self.achieved[name],
                    "load_average": self.load_average[name],
                    "networks": {network: self.spread(name, network).to_json() for network in found},
                }
                for name, found in self.times.items()
            },
            "rank_correlation": self.rank_correlation(),
            "reversals": [reversal.__dict__ for reversal in self.reversals()],
            "threads": self.threads,
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        }


def study(
    runners: Mapping[str, Runner | Callable[[np.ndarray], Any]],
    example: np.ndarray | Tensor,
    conditions: Sequence[Contention] = (Contention(0), Contention(1), Contention(2), Contention(4)),
    *,
    samples: int = 500,
    period: float | int | None = None,
) -> VariabilityStudy:
    """Measure `runners` under each of `conditions`, interleaved within each, and compare their orders.

    The runners are prepared once, so caches and threads are the same in all conditions. `samples`: single calls of each
    runner in each condition (500 for a p99). `period`: seconds between calls, None: back to back. Nothing of the
    networks is touched. Costs ``samples x runners x conditions`` calls. Raises `UsageError` for equal conditions.
    """
    names = [str(condition) for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise UsageError("contention: name each condition once, and at least one.")
    times, achieved, load = {}, {}, {}
    for name, condition in zip(names, conditions, strict=True):
        load[name] = os.getloadavg()[0]
        with contention(condition) as background:
            times[name] = sample(runners, example, samples=samples, period=period)
            achieved[name] = background.achieved()
    threads = max(getattr(runner, "threads", 1) for runner in runners.values())
    return VariabilityStudy(times, achieved, load, threads)


def study_table(found: VariabilityStudy) -> Any:
    """Return a `rich` table: for each condition and network p50, p95, p99, CV and the slowdown; reversals below."""
    from rich.table import Table

    reversals = "; ".join(
        f"{one.faster} is faster than {one.slower} in {one.first}, slower in {one.second}" for one in found.reversals()
    )
    taus = ", ".join(f"{name} {tau:.2f}" for name, tau in found.rank_correlation().items())
    table = Table(
        title="Latency under background load (ms)",
        caption=f"Rank correlation with the first condition: {taus}. Orders reversed: {reversals or 'none'}.",
    )
    for title in ("condition", "load got", "network"):
        table.add_column(title)
    for title in ("p50", "p95", "p99", "CV", "slowdown"):
        table.add_column(title, justify="right")
    for condition, networks in found.times.items():
        for network in networks:
            one = found.spread(condition, network)
            figures = [f"{value:.3g}" for value in (one.p50, one.p95, one.p99, one.cv)]
            slowdown = f"{found.slowdown(network)[condition]:.2f}x"
            table.add_row(condition, f"{found.achieved[condition]:.2f}", network, *figures, slowdown)
    return table
