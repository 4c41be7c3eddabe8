"""Budgets: what is read is what is meant, what is written is read back, and what cannot be meant is said in one line."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.cost import Budget, Cost, Limit, status_rows, status_table, status_text, unreachable
from convette.errors import BudgetError, UsageError
from convette.runtime import Latency


def latency(p50, engine="eager:cpu"):
    return Latency(engine, "cpu", "fp32", 1, 1, 100, p50, 2 * p50, 3 * p50, p50, (p50, p50), 9.0, 0.1, (p50,))


def cost(macs=1_000_000, parameters=2000, size=8000, memory=4000, **engines):
    found = {name.replace("_", ":"): latency(p50, name.replace("_", ":")) for name, p50 in engines.items()}
    return Cost(parameters=parameters, macs=macs, size=size, memory=memory, latency=found)


def only(text):
    (limit,) = Budget.parse(text).limits
    return limit


@pytest.mark.parametrize(
    "text, metric, percentile, value, relative, engine",
    [
        ("latency<=2ms", "latency", "p50", 2.0, False, None),
        ("latency<=1us", "latency", "p50", 0.001, False, None),
        ("latency <= 0.5 s", "latency", "p50", 500.0, False, None),
        ("latency≤3µs", "latency", "p50", 0.003, False, None),
        ("latency.p99<=5ms@openvino:cpu", "latency", "p99", 5.0, False, "openvino:cpu"),
        ("latency.p95<=50%@onnxruntime", "latency", "p95", 0.5, True, "onnxruntime:cpu"),
        ("latency<=5ms@OpenVINO:cpu:bf16", "latency", "p50", 5.0, False, "openvino:cpu:bf16"),
        ("params<=30%", "parameters", None, 0.3, True, None),
        ("parameters<=300K", "parameters", None, 300e3, False, None),
        ("Params<=1.25m", "parameters", None, 1.25e6, False, None),
        ("macs<=40%", "macs", None, 0.4, True, None),
        ("macs<=100%", "macs", None, 1.0, True, None),
        ("macs<=1.5G", "macs", None, 1.5e9, False, None),
        ("macs<=1500000", "macs", None, 1.5e6, False, None),
        ("macs<=1e6", "macs", None, 1e6, False, None),
        ("size<=30KB", "size", None, 30e3, False, None),
        ("size<=30KiB", "size", None, 30 * 1024, False, None),
        ("size<=900B", "size", None, 900.0, False, None),
        ("memory<=10MB", "memory", None, 10e6, False, None),
        ("memory<=.5mib", "memory", None, 2**19, False, None),
    ],
)
def test_reading(text, metric, percentile, value, relative, engine):
    assert only(text) == Limit(metric, percentile, value, relative, engine)


def test_several_limits_and_their_engines():
    budget = Budget.parse("latency<=2ms, params<=30%, latency.p99<=5ms@openvino:cpu")
    assert [limit.metric for limit in budget.limits] == ["latency", "parameters", "latency"]
    assert budget.engines == ("eager:cpu", "openvino:cpu")
    assert budget.on("onnxruntime:cpu").engines == ("onnxruntime:cpu", "openvino:cpu")
    assert Budget.parse(["latency<=2ms", "params<=30%, latency.p99<=5ms@openvino:cpu"]) == budget
    assert Budget.parse(budget) is budget
    assert Budget.parse("macs<=40%").engines == ()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty. Write for example macs<=40%"),
        (" , ", "empty"),
        ("macs", "has no '<='"),
        ("macs<40%", "uses '<': write METRIC<=VALUE"),
        ("macs>=40%", "uses '>='"),
        ("macs=40%", "uses '='"),
        ("macz<=40%", "unknown metric 'macz'. Did you mean 'macs'?"),
        ("<=40%", "unknown metric ''"),
        ("accuracy<=40%", "unknown metric 'accuracy'. Known: latency, macs, memory, parameters, params, size."),
        ("flops<=1G", "Write macs instead of flops"),
        ("GFLOPs<=1", "Write macs instead of gflops"),
        ("latency<=2", "2 has no unit. latency takes us, ms, s or %: write latency<=2ms"),
        ("size<=30", "30 has no unit. size takes B, KB"),
        ("macs<=40", "Write 40%, 40K or 40M"),
        ("latency<=2KB", "'KB' is no unit of latency"),
        ("macs<=3MB", "'MB' is no unit of macs. It takes K, M, G, T or %"),
        ("macs<=", "is not a number"),
        ("macs<=lots", "is not a number"),
        ("macs<=nan", "is not a number"),
        ("macs<=1e999G", "above zero and finite"),
        ("macs<=0%", "above zero"),
        ("macs<=-3M", "above zero"),
        ("params<=130%", "more than 100% of the start limits nothing. Write 100% or less"),
        ("macs<=1,5G", "write 1.5 with a point"),
        ("macs<=40%, macs<=3M", "limit the same figure. Keep the tighter one"),
        ("latency<=1ms, latency.p50<=2ms", "limit the same figure"),
        ("latency<=1ms@openvino, latency<=2ms@openvino:cpu", "limit the same figure"),
        ("latency.p98<=2ms", "unknown percentile 'p98'. Known: latency.p50, latency.p95, latency.p99"),
        ("latency.<=2ms", "unknown percentile ''"),
        ("macs.p50<=40%", "only latency has percentiles. Write macs"),
        ("macs<=40%@eager:cpu", "only latency depends on an engine"),
        ("latency<=2ms@", "no engine after '@'"),
        ("latency<=2ms@openvno:cpu", "unknown engine 'openvno' in 'openvno:cpu'. Did you mean 'openvino'?"),
        ("latency@openvino:cpu<=2ms", "name the engine behind the value: latency<=2ms@openvino:cpu"),
    ],
)
def test_what_cannot_be_meant(text, said):
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


POSITIVE = st.floats(min_value=1e-12, max_value=1e18, allow_nan=False, exclude_min=True)
LIMITS = st.one_of(
    st.builds(
        Limit,
        metric=st.just("latency"),
        percentile=st.sampled_from(["p50", "p95", "p99"]),
        value=POSITIVE,
        relative=st.just(False),
        engine=st.sampled_from([None, "openvino:cpu", "eager:cpu:bf16", "compiled:cuda"]),
    ),
    st.builds(
        Limit,
        metric=st.sampled_from(["macs", "parameters", "size", "memory"]),
        percentile=st.none(),
        value=POSITIVE,
        relative=st.just(False),
        engine=st.none(),
    ),
    st.builds(
        Limit,
        metric=st.sampled_from(["macs", "parameters", "size", "memory"]),
        percentile=st.none(),
        value=st.floats(min_value=1e-9, max_value=1.0),
        relative=st.just(True),
        engine=st.none(),
    ),
)


@settings(deadline=None)
@given(st.lists(LIMITS, min_size=1, max_size=6, unique_by=lambda limit: limit.key))
def test_what_is_written_is_read_back(limits):
    budget = Budget(tuple(limits))
    assert Budget.parse(str(budget)) == budget
    assert str(Budget.parse(str(budget))) == str(budget)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        Budget.parse(text)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1


def test_plain_budgets_are_written_as_people_write_them():
    text = "latency<=2ms, parameters<=30%, latency.p99<=5ms@openvino:cpu, macs<=1.5G, size<=30KB, memory<=250us"
    text = text.replace("memory<=250us", "memory<=10MB")
    assert str(Budget.parse(text)) == text
    assert str(only("latency<=0.25ms")) == "latency<=250us"


def test_resolving_and_checking():
    start = cost(eager_cpu=4.0, openvino_cpu=1.0)
    budget = Budget.parse("macs<=40%, params<=1500, latency.p99<=50%@openvino:cpu")
    with pytest.raises(UsageError, match="resolve"):
        budget.check(start)
    fixed = budget.resolve(start)
    assert [limit.value for limit in fixed.limits] == [400_000, 1500, 1.5]
    assert not any(limit.relative for limit in fixed.limits)
    assert fixed.resolve(cost(macs=1)) == fixed
    assert [(status.value, status.met) for status in fixed.check(start)] == [
        (1_000_000, False),
        (2000, False),
        (3.0, False),
    ]
    small = cost(macs=400_000, parameters=1500, openvino_cpu=0.5)
    assert fixed.met(small) and not fixed.met(dataclasses.replace(small, macs=400_001))


def test_a_latency_that_was_not_measured():
    with pytest.raises(UsageError, match=r"No latency was measured on 'openvino:cpu' \(measured: eager:cpu\)"):
        Budget.parse("latency<=1ms@openvino:cpu").met(cost(eager_cpu=4.0))
    with pytest.raises(UsageError, match=r"on 'eager:cpu' \(measured: none\)"):
        Budget.parse("latency<=50%").resolve(cost())


def test_a_latency_without_engine_is_that_of_the_only_one_measured():
    budget = Budget.parse("latency<=2ms")
    assert budget.met(cost(openvino_cpu=1.0))
    assert not budget.met(cost(openvino_cpu=1.0, eager_cpu=4.0))  # of several the default counts


def test_unreachable_names_the_smallest_cost():
    budget = Budget.parse("latency<=1us@openvino:cpu, macs<=2M, size<=7KB")
    error = unreachable(budget, cost(openvino_cpu=0.05))
    assert isinstance(error, BudgetError) and error.exit_code == 4
    text = str(error)
    assert "latency.p50@openvino:cpu can go down to 50 us at the least, the limit is 1 us" in text
    assert "size can go down to 8 KB at the least, the limit is 7 KB" in text
    assert "macs can go" not in text and "\n" not in text
    together = unreachable(Budget.parse("macs<=2M"), cost())
    assert "cannot all be met at once" in str(together)
    measured = Budget((Limit("latency", "p50", 0.06862170048407279, False, "openvino:cpu"),))
    assert str(unreachable(measured, cost(openvino_cpu=0.0758))).startswith(
        "The budget 'latency<=68.62us@openvino:cpu'"
    )
    counted = Budget((Limit("macs", None, 18135.664640000003, False, None),))
    assert str(unreachable(counted, cost())).startswith("The budget 'macs<=18.14K'")


def test_statuses_as_text_rows_and_table():
    start, end = cost(eager_cpu=4.0), cost(macs=390_000, eager_cpu=3.0)
    statuses = Budget.parse("macs<=40%, latency<=2ms, size<=2KB").resolve(start).check(end)
    assert status_text(statuses) == (
        "macs 390 K of 400 K: met; latency.p50 3 ms of 2 ms: over by 50 %; size 8 KB of 2 KB: 4 times too much"
    )
    assert status_rows(statuses, start)[0] == {
        "metric": "macs",
        "limit": "400 K",
        "value": "390 K",
        "met": "yes",
        "start": "1 M",
        "share": "39.0 %",
    }
    assert [row["met"] for row in status_rows(statuses)] == ["yes", "no", "no"]
    assert status_table(statuses, start).row_count == 3
