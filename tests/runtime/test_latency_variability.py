"""Latency variability: the statistics against closed forms, the load that always ends, orders that reverse."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
import torch

from convette.errors import UsageError
from convette.runtime import Contention, contention, spread, study
from convette.runtime.latency_variability import (
    VariabilityStudy,
    bootstrap,
    kendall_tau,
    miss_rate,
    probability_faster,
    sample,
    study_table,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def fake(clock, seconds):
    def run(batch):
        clock.now += seconds() if callable(seconds) else seconds

    return run


BATCH = np.zeros((1, 1, 1, 1), np.float32)


def test_statistics_are_those_of_a_lognormal():
    times = np.random.default_rng(0).lognormal(1.0, 0.3, 100_000)
    found = spread(times, resamples=20)
    z = {"p50": 0.0, "p90": 1.28155, "p95": 1.64485, "p99": 2.32635}
    for name, value in z.items():
        assert getattr(found, name) == pytest.approx(np.exp(1 + 0.3 * value), rel=0.02)
    assert found.mean == pytest.approx(np.exp(1 + 0.045), rel=0.02)
    assert found.cv == pytest.approx(np.sqrt(np.exp(0.09) - 1), rel=0.02)
    q1, q3 = np.exp(1 - 0.3 * 0.67449), np.exp(1 + 0.3 * 0.67449)
    assert found.qcd == pytest.approx((q3 - q1) / (q3 + q1), rel=0.02)
    assert found.tail == pytest.approx(np.exp(0.3 * 2.32635), rel=0.02)
    assert found.drift == pytest.approx(1, rel=0.02)
    assert miss_rate(times, np.exp(1)) == pytest.approx(0.5, abs=0.01)


def test_the_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(300):
        low, high = bootstrap(generator.normal(size=400), lambda x: x.mean(axis=1), block=5, resamples=200, seed=trial)
        held += low <= 0 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_a_known_distribution_is_recovered_in_blocks_a_b_b_a():
    clock, order = Clock(), []
    generator = np.random.default_rng(2)

    def recorded(name, seconds):
        work = fake(clock, seconds)

        def run(batch):
            order.append(name)
            work(batch)

        return run

    times = sample(
        {"a": recorded("a", lambda: generator.normal(0.01, 0.001)), "b": recorded("b", 0.02)},
        BATCH,
        samples=200,
        warmup=0,
        clock=clock,
    )
    assert np.median(times["a"]) == pytest.approx(10, abs=0.2)
    assert np.allclose(times["b"], 20)
    assert "".join(order[::21][:6]) == "abbaab"


def test_a_slowdown_in_the_middle_hits_all_alike():
    clock = Clock()
    slow = lambda seconds: lambda: seconds * (3 if clock.now > 20 else 1)  # noqa: E731
    times = sample(
        {"a": fake(clock, slow(0.01)), "b": fake(clock, slow(0.02))}, BATCH, samples=1200, warmup=0, clock=clock
    )
    assert times["b"].mean() / times["a"].mean() == pytest.approx(2, rel=0.05)


def test_an_open_loop_counts_the_queue():
    clock = Clock()
    late = sample({"a": fake(clock, 0.02)}, BATCH, samples=5, warmup=0, period=0.01, clock=clock, sleep=clock.sleep)
    assert np.allclose(late["a"], [20, 30, 40, 50, 60])
    early = sample({"a": fake(clock, 0.02)}, BATCH, samples=5, warmup=0, period=0.03, clock=clock, sleep=clock.sleep)
    assert np.allclose(early["a"], 20)


def test_the_chances_of_being_faster_add_up():
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 20, 300), generator.integers(3, 25, 200)
    ties = (a[:, None] == b[None]).mean()
    assert probability_faster(a, b) + probability_faster(b, a) + ties == pytest.approx(1)
    assert probability_faster(a, b) == pytest.approx((a[:, None] < b[None]).mean())
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1 and kendall_tau([1], [5]) == 1


def made(**conditions):
    return VariabilityStudy(conditions, dict.fromkeys(conditions, 0.0), dict.fromkeys(conditions, 0.0), 1)


def noisy(median, seed):
    return median * np.random.default_rng(seed).lognormal(0, 0.1, 500)


def test_reversals_are_found_and_only_where_they_are():
    found = made(idle={"a": noisy(1, 0), "b": noisy(2, 1)}, busy={"a": noisy(5, 2), "b": noisy(4, 3)})
    (one,) = found.reversals()
    assert (one.faster, one.slower, one.first, one.second) == ("a", "b", "idle", "busy")
    assert found.rank_correlation() == {"idle": 1.0, "busy": -1.0}
    assert found.slowdown("a")["busy"] == pytest.approx(5, rel=0.05)
    assert "a is faster than b in idle" in study_table(found).caption
    same = sum(
        bool(
            made(
                idle={"a": noisy(1, s), "b": noisy(1, 900 + s)}, busy={"a": noisy(2, 300 + s), "b": noisy(2, 600 + s)}
            ).reversals()
        )
        for s in range(20)
    )
    assert same <= 1


def test_the_robust_cost_is_the_worst_or_a_declared_mix():
    found = made(idle={"a": noisy(1, 0)}, busy={"a": noisy(3, 1)})
    each = {name: np.percentile(x["a"], 95) for name, x in found.times.items()}
    assert found.robust_cost("a") == max(each.values())
    mix = found.robust_cost("a", weights={"idle": 0.75, "busy": 0.25})
    assert mix == pytest.approx(0.75 * each["idle"] + 0.25 * each["busy"])
    spreads = [spread(x["a"]) for x in found.times.values()]
    assert found.robust_cost("a", kappa=2) == pytest.approx(max(one.mean + 2 * one.sd for one in spreads))
    for weights in ({"idle": 1.0}, {"idle": 0.5, "busy": 0.6}):
        with pytest.raises(UsageError, match="add up to 1"):
            found.robust_cost("a", weights=weights)
    mu, sigma = found.common_slowdown("busy")
    assert mu == pytest.approx(np.log(3), abs=0.05) and sigma == pytest.approx(0.1, rel=0.2)
    # Its own quantiles come back from its idle mean; another network's are in proportion.
    for percentile in (50, 95):
        expected = np.percentile(found.times["busy"]["a"], percentile)
        assert found.predicted(found.times["idle"]["a"].mean(), "busy", percentile) == pytest.approx(expected, rel=0.05)
    assert found.predicted(2.0, "busy") == pytest.approx(2 * found.predicted(1.0, "busy"))


def test_a_condition_that_cannot_be_is_refused():
    for arguments, word in (((-1,), "cannot be"), ((1, 0), "duty"), ((1, 1.5), "duty"), ((1, 1, "gpu"), "alu")):
        with pytest.raises(UsageError, match=word):
            Contention(*arguments)
    assert str(Contention(0)) == "idle" and str(Contention(2, 0.5, "mem")) == "2 x mem 50 %"
    with pytest.raises(UsageError, match="once"):
        study({}, BATCH, [Contention(1), Contention(1)])
    with pytest.raises(UsageError, match="nothing to measure"):
        sample({}, BATCH)


def gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["alu", "mixed"])
def test_the_load_runs_and_is_gone_after_an_exception(kind):
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), contention(2, duty=0.5, kind=kind, settle=0) as load:
        assert all(psutil.pid_exists(pid) for pid in load.pids) and len(load.pids) == 2
        deadline = time.monotonic() + 20
        while load.achieved() == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert load.achieved() > 0
        torch.set_num_threads(threads + 1)
        raise ZeroDivisionError
    assert gone(load.pids)
    assert torch.get_num_threads() == threads


def test_the_load_dies_with_a_parent_that_is_killed():
    code = """
        import time
        from convette.runtime import contention
        with contention(2, settle=0) as load:
            print(*load.pids, flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert gone(pids)
    finally:
        parent.kill()
        parent.communicate()


def test_a_study_measures_every_network_in_every_condition():
    work = {name: (lambda batch: None) for name in "ab"}
    found = study(work, BATCH, [Contention(0), Contention(1, 0.25)], samples=40)
    assert found.conditions == ("idle", "1 x alu 25 %")
    assert all(len(x) == 40 for times in found.times.values() for x in times.values())
    report = found.to_json()
    assert report["conditions"]["idle"]["networks"]["a"]["samples"] == 40
    assert report["conditions"]["idle"]["achieved"] == 0
