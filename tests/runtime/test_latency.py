import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.errors import UsageError
from convette.runtime import Latency, fastest, measure_latency, prepare
from convette.runtime.latency import measure, median_interval


class Clock:
    """A clock that moves only when a fake runner works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeRunner:
    engine, device, precision, threads, cold_start_seconds = "fake:cpu", "cpu", "fp32", 1, 0.5

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def __call__(self, batch):
        self.calls += 1
        self.clock.now += self.seconds(self) if callable(self.seconds) else self.seconds


def run(clock, runners, **options):
    options = {"time_limit": 5.0, "relative_error": 0.02, "minimum_samples": 50, "warmup": None, **options}
    return measure(runners, np.zeros((4, 1, 1, 1), np.float32), clock=clock, **options)


@given(st.lists(st.floats(1e-4, 0.2), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_steady_runner_is_measured_exactly(seconds):
    clock = Clock()
    result = run(clock, {str(index): FakeRunner(clock, value) for index, value in enumerate(seconds)})
    for index, value in enumerate(seconds):
        latency = result[str(index)]
        assert latency.p50 == pytest.approx(1e3 * value)
        assert latency.p50_interval == pytest.approx((1e3 * value, 1e3 * value))
        assert latency.batch_size == 4
        assert latency.cold_start == 500.0


def test_percentiles_are_those_of_the_distribution():
    clock, generator = Clock(), np.random.default_rng(0)
    latency = run(
        clock,
        {"a": FakeRunner(clock, lambda _: float(generator.lognormal(-6, 0.2)))},
        relative_error=1e-9,
        time_limit=60.0,
    )["a"]
    expected = 1e3 * np.exp(-6 + 0.2 * np.array([0.0, 1.6449, 2.3263]))
    assert latency.samples > 10_000
    np.testing.assert_allclose([latency.p50, latency.p95, latency.p99], expected, rtol=0.02)
    assert latency.mean == pytest.approx(1e3 * np.exp(-6 + 0.02), rel=0.02)
    assert len(latency.timings) == 500
    assert latency.p50_interval[0] <= latency.p50 <= latency.p50_interval[1]


def test_a_slowdown_of_the_machine_hits_all_alike():
    clock = Clock()
    slowed = lambda seconds: lambda _: seconds * (2.0 if clock.now > 3 else 1.0)  # noqa: E731
    result = run(
        clock, {"a": FakeRunner(clock, slowed(0.01)), "b": FakeRunner(clock, slowed(0.02))}, relative_error=1e-9
    )
    assert result["b"].p50 / result["a"].p50 == pytest.approx(2.0, rel=0.05)


def test_it_ends_when_known_well_enough_and_at_the_limit_when_not():
    clock, generator = Clock(), np.random.default_rng(1)
    noisy = lambda _: float(generator.uniform(0.001, 0.003))  # noqa: E731
    loose = run(clock, {"a": FakeRunner(clock, noisy)}, relative_error=0.2)["a"]
    tight = run(clock, {"a": FakeRunner(clock, noisy)}, relative_error=0.02, time_limit=60.0)["a"]
    assert 50 <= loose.samples < tight.samples
    assert (tight.p50_interval[1] - tight.p50_interval[0]) / 2 <= 0.02 * tight.p50
    start = clock.now
    never = run(
        clock, {"a": FakeRunner(clock, noisy), "b": FakeRunner(clock, noisy)}, relative_error=1e-9, time_limit=2.0
    )
    assert 4 <= clock.now - start <= 5
    assert never["a"].samples == never["b"].samples
    assert run(clock, {"a": FakeRunner(clock, noisy)}, relative_error=1.0, minimum_samples=500)["a"].samples >= 500


def test_a_slow_runner_is_still_measured_once():
    clock = Clock()
    slow = FakeRunner(clock, 100.0)
    assert run(clock, {"slow": slow}, time_limit=1.0, warmup=1)["slow"].samples == 1
    assert slow.calls == 3  # one to warm up, one before the block, one timed


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = np.random.default_rng(2)
    truth = np.exp(0.0)
    inside = 0
    for _ in range(200):
        low, high = median_interval(generator.lognormal(0.0, 0.3, size=(20, 10)), resamples=200)
        inside += low <= truth <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_real_runners_are_measured_and_read_back(tiny, images):
    with prepare("eager:cpu", tiny, images[:2]) as eager, prepare("onnxruntime:cpu", tiny, images[:2]) as onnx:
        result = measure_latency({"eager": eager, "onnx": onnx}, images[:2], time_limit=0.2)
    assert list(result) == ["eager", "onnx"]
    for name, latency in result.items():
        assert 0 < latency.p50 <= latency.p95 <= latency.p99
        assert latency.engine == {"eager": "eager:cpu", "onnx": "onnxruntime:cpu"}[name]
        assert latency.batch_size == 2 and latency.cold_start > 0
        assert Latency.from_json(json.loads(json.dumps(latency.to_json(), allow_nan=False))) == latency
    with pytest.raises(UsageError, match="p50 missing or unknown"):
        Latency.from_json({key: value for key, value in latency.to_json().items() if key != "p50"})


def test_nothing_to_measure_is_refused(images):
    with pytest.raises(UsageError, match="no runner"):
        measure_latency({}, images)
    with pytest.raises(UsageError, match="greater than zero"):
        run(Clock(), {"a": FakeRunner(Clock(), 1.0)}, time_limit=0.0)


def latency_of(p50, precision="fp32", width=0.01):
    return Latency(
        "e", "cpu", precision, 1, 1, 1, p50, p50, p50, p50, (p50 * (1 - width), p50 * (1 + width)), 1.0, 0.0, (p50,)
    )


def test_the_fastest_that_is_accurate_enough_is_named_with_the_reason():
    latencies = {
        "int8": latency_of(1.0, "int8"),
        "bf16": latency_of(2.0, "bf16"),
        "other": latency_of(2.01, "bf16"),
        "fp32": latency_of(4.0),
    }
    accuracies = {"int8": 0.80, "bf16": 0.899, "other": 0.9, "fp32": 0.9}
    choice = fastest(latencies, accuracies, max_accuracy_drop=0.01, reference="fp32")
    assert choice.name == "bf16"
    assert "int8 is faster (1 ms) but loses 10.00 points" in choice.reason
    assert "other cannot be told apart" in choice.reason
    assert fastest(latencies).name == "int8"
    assert fastest(latencies, accuracies, max_accuracy_drop=0.0, reference="fp32").name == "other"
    with pytest.raises(UsageError, match="no accuracy is known for fp32"):
        fastest(latencies, dict.fromkeys(("int8", "bf16", "other"), 1.0))
    with pytest.raises(UsageError, match="nothing"):
        fastest({})


def test_of_equally_fast_ones_the_most_precise_is_named():
    latencies = {"int8": latency_of(2.0, "int8"), "bf16": latency_of(2.01, "bf16"), "fp32": latency_of(2.5)}
    choice = fastest(latencies)
    assert choice.name == "bf16"
    assert "int8 cannot be told apart from it in speed and no more precise" in choice.reason


def test_the_tails_have_intervals_that_hold_them_and_old_files_are_read_without():
    clock, generator = Clock(), np.random.default_rng(0)
    held = 0
    for _ in range(40):
        runner = FakeRunner(clock, lambda _: float(generator.lognormal(-6, 0.2)))
        latency = run(clock, {"a": runner}, minimum_samples=1000, relative_error=0.5, time_limit=60.0)["a"]
        low, high = latency.tail_intervals["p99"]
        assert low <= latency.p99 <= high == latency.upper("p99")
        held += low <= 1e3 * np.exp(-6 + 0.2 * 2.3263) <= high
    assert held >= 34
    assert latency.upper() == latency.p50_interval[1] < latency.upper("p95") < latency.upper("p99")
    assert Latency.from_json(json.loads(json.dumps(latency.to_json()))) == latency
    old = latency.to_json()
    del old["tail_intervals"]
    assert Latency.from_json(old).upper("p99") == latency.p99
