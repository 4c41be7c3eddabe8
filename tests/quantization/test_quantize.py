import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from convette.errors import BudgetError, DataError, UsageError
from convette.quantization import Candidate, QuantizeSettings, _quantize, choose, quantize
from convette.runtime import Latency

QUICK = QuantizeSettings(calibration_images=64, time_limit=0.1)


def test_every_candidate_is_measured_and_one_is_kept(net, digits, evaluate_digits, tmp_path):
    result = quantize(net, digits, QUICK, out=tmp_path, evaluate=evaluate_digits)
    names = [candidate.name for candidate in result.candidates]
    expected = {"openvino:cpu:fp32", "openvino:cpu:int8", "onnxruntime:cpu:fp32", "onnxruntime:cpu:int8"}
    assert expected <= set(names) <= expected | {"openvino:cpu"}
    assert result.kept in names and result.failures == ()
    assert result.reason.startswith(result.kept) and "\n" not in result.reason
    for candidate in result.candidates:
        assert candidate.path.is_file() and candidate.path.parent == tmp_path
        assert candidate.accuracy > 0.9 and candidate.size > 0 and candidate.latency.p50 > 0
        assert candidate.latency.engine == candidate.name and candidate.latency.precision == candidate.precision
    int8 = [candidate for candidate in result.candidates if candidate.precision == "int8"]
    assert all(candidate.path.name.startswith("model.int8.") for candidate in int8)
    assert result.quantized == (result.chosen in int8)
    json.dumps(result.to_json(), allow_nan=False)


def test_off_makes_no_int8(net, digits, evaluate_digits, tmp_path):
    settings = QuantizeSettings(mode="off", time_limit=0.05, engines=("onnxruntime:cpu",))
    result = quantize(net, digits, settings, out=tmp_path, evaluate=evaluate_digits)
    assert [candidate.name for candidate in result.candidates] == ["onnxruntime:cpu:fp32"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert not result.quantized and "no int8 was made" in result.reason


def test_an_int8_file_that_cannot_be_made_is_told_and_the_float_kept(
    net, digits, evaluate_digits, tmp_path, monkeypatch
):
    from convette.errors import ConvetteError

    def fails(*arguments, **options):
        raise ConvetteError("NNCF cannot quantise Net: no reason.")

    monkeypatch.setattr(_quantize, "quantize_openvino", fails)
    settings = QuantizeSettings(calibration_images=64, time_limit=0.05, engines=("openvino:cpu",))
    result = quantize(net, digits, settings, out=tmp_path, evaluate=evaluate_digits)
    assert result.failures == ("NNCF cannot quantise Net: no reason.",)
    assert result.chosen.precision in ("fp32", "bf16")


def test_useless_calibration_data_is_an_error_not_a_fallback(net, digits, evaluate_digits, tmp_path):
    from dataclasses import replace

    same = replace(digits.train, stored=digits.train.stored[:1].expand(50, -1, -1, -1), labels=digits.train.labels[:50])
    with pytest.raises(DataError, match="all the same"):
        quantize(net, replace(digits, train=same), QUICK, out=tmp_path, evaluate=evaluate_digits)


def candidate(name, precision, accuracy, p50, size=1000, width=0.01):
    interval = (p50 * (1 - width), p50 * (1 + width))
    latency = Latency(name, "cpu", precision, 1, 1, 50, p50, p50, p50, p50, interval, 1.0, 0.0, (p50,))
    return Candidate(name, precision, accuracy, latency, size, Path("model.xml"))


def pick(int8_accuracy=0.9, int8_ms=1.0, mode="auto", max_size=None):
    candidates = [
        candidate("openvino:cpu:fp32", "fp32", 0.9, 4.0),
        candidate("openvino:cpu", "bf16", 0.899, 2.0),
        candidate("openvino:cpu:int8", "int8", int8_accuracy, int8_ms, size=300),
    ]
    return choose(candidates, QuantizeSettings(mode=mode), max_size)


def test_the_choice_and_its_reason():
    assert pick() == (
        "openvino:cpu:int8",
        "openvino:cpu:int8 (1 ms, 90.00 %, 300 bytes) is kept: faster than "
        "openvino:cpu in bf16 (2 ms, 89.90 %, 1,000 bytes) and accurate enough.",
    )
    kept, reason = pick(int8_ms=1.99)
    assert kept == "openvino:cpu" and "int8 is no faster than it" in reason
    kept, reason = pick(int8_ms=3.0)
    assert kept == "openvino:cpu" and "int8 is slower than it" in reason
    kept, reason = pick(int8_accuracy=0.88)
    assert kept == "openvino:cpu" and "loses 2.00 points of accuracy, more than the 1.00 allowed" in reason
    kept, reason = pick(int8_ms=3.0, mode="on")
    assert kept == "openvino:cpu:int8" and "kept as asked, though it is slower" in reason
    kept, reason = pick(int8_accuracy=0.88, mode="on")
    assert kept == "openvino:cpu", "the accuracy limit holds even when int8 is asked for"
    kept, reason = pick(int8_ms=3.0, max_size=500)
    assert kept == "openvino:cpu:int8" and "has 1,000 bytes, more than the 500 allowed" in reason
    with pytest.raises(BudgetError, match="smallest: 300"):
        pick(max_size=100)


rows = st.tuples(
    st.sampled_from(["bf16", "int8"]), st.floats(0.5, 1.0), st.floats(0.1, 10.0), st.integers(1, 100), st.floats(0, 0.5)
)


@given(st.lists(rows, max_size=5), st.floats(0, 0.2), st.sampled_from(["auto", "on"]))
def test_int8_is_kept_only_if_faster_and_accurate(others, drop, mode):
    candidates = [candidate("float", "fp32", 0.9, 2.0, 100)] + [
        candidate(f"{precision}{index}", precision, accuracy, p50, size, width)
        for index, (precision, accuracy, p50, size, width) in enumerate(others)
    ]
    kept, reason = choose(candidates, QuantizeSettings(mode=mode, max_accuracy_drop=drop))
    chosen = next(candidate for candidate in candidates if candidate.name == kept)
    assert chosen.accuracy >= 0.9 - drop - 1e-6
    if chosen.precision == "int8" and mode == "auto":
        for other in candidates:
            if other.precision != "int8" and other.accuracy >= 0.9 - drop:
                assert chosen.latency.p50 < other.latency.p50
    assert reason.startswith(kept) and reason.endswith(".")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_images": 1}, "at least 2"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_accuracy_drop": 1.5}, "share in 0..1"),
        ({"time_limit": 0.0}, "above 0"),
        ({"engines": ()}, "empty"),
        ({"engines": ("eager:cpu",)}, "openvino:cpu, onnxruntime:cpu"),
        ({"engines": ("openvno",)}, "Did you mean 'openvino'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        QuantizeSettings(**settings)


def test_an_unknown_mode_is_named():
    with pytest.raises(UsageError, match="Did you mean 'auto'"):
        QuantizeSettings.__post_init__(SimpleNamespace(mode="atuo"))


def test_a_recipe_may_not_hold_other_keys():
    with pytest.raises(ValidationError, match="calibration"):
        TypeAdapter(QuantizeSettings).validate_python({"calibration": 3})
