"""Which engine: all are measured in one run, int8 too, and the choice says what it rests on."""

import numpy as np
import pytest
import torch

from convette.errors import UsageError
from convette.quantization import all_engines, random_images, survey_engines
from convette.quantization.engines import _choose
from convette.runtime import Latency

ENGINES = ("eager:cpu", "onnxruntime:cpu", "onnxruntime:cpu:int8", "openvino:cpu:int8")


def latency(p50, precision):
    return Latency("x", "cpu", precision, 1, 1, 100, p50, p50, p50, p50, (p50 * 0.99, p50 * 1.01), 1.0, 0.0, (p50,))


def test_every_engine_and_precision_is_named():
    found = all_engines()
    assert {"eager:cpu", "compiled:cpu", "onnxruntime:cpu", "onnxruntime:cpu:int8"} <= set(found)
    assert {f"openvino:cpu:{precision}" for precision in ("fp32", "bf16", "int8")} <= set(found)


def test_random_images_have_the_statistics_of_preprocessed_ones():
    images = torch.cat(random_images((3, 24, 20), 40, seed=1))
    assert images.shape == (40, 3, 24, 20)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    assert power[0, 1] > 20 * power[0, 8]  # 1/f amplitudes: (1/8)^2 = 1/64 of the power
    neighbours = np.corrcoef(images[..., :-1].flatten(), images[..., 1:].flatten())[0, 1]
    assert neighbours > 0.6
    assert torch.equal(torch.cat(random_images((3, 24, 20), 40, seed=1)), images)
    assert torch.isfinite(torch.cat(random_images((1, 1, 1), 3))).all()


def test_a_survey_measures_all_and_says_what_it_rests_on(net, images, calibration, capsys):
    found = survey_engines(net, images[:1], engines=ENGINES, time_limit=0.05)
    assert set(found.latency) == set(ENGINES) == set(found.agreement)
    assert found.random_images and "random images" in capsys.readouterr().err
    assert found.latency["openvino:cpu:int8"].precision == "int8"
    assert found.latency[found.choice.name].precision == "fp32"  # accuracy of int8 is not known
    assert found.agreement["eager:cpu"] == 1
    real = survey_engines(
        net, images[:1], calibration=calibration, images=images[:200], engines=ENGINES, time_limit=0.05
    )
    assert not real.random_images and real.images == 200
    assert real.agreement["openvino:cpu:int8"] >= 0.95
    assert real.to_json()["use"] == real.choice.name in ENGINES


def test_an_engine_that_fails_is_left_out_and_told(net, images):
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        broken[1].weight.fill_(float("nan"))
    found = survey_engines(broken, images[:1], engines=("eager:cpu", "onnxruntime:cpu"), time_limit=0.05)
    assert set(found.latency) == {"eager:cpu"} and "NaN" in found.missing["onnxruntime:cpu"]
    with pytest.raises(UsageError, match="no engine could be measured"):
        survey_engines(broken, images[:1], engines=("onnxruntime:cpu",))


def test_the_choice_with_and_without_real_images():
    times = {"a": latency(2.0, "fp32"), "b": latency(1.0, "int8")}
    assert _choose(times, {"a": 1.0, "b": 1.0}, True, 0.02).name == "a"
    assert "worth a try" in _choose(times, {"a": 1.0, "b": 1.0}, True, 0.02).reason
    assert _choose(times, {"a": 1.0, "b": 0.99}, False, 0.02).name == "b"
    refused = _choose(times, {"a": 1.0, "b": 0.9}, False, 0.02)
    assert refused.name == "a" and "disagrees on 10.00 points" in refused.reason
    slow = _choose({"a": latency(1.0, "fp32"), "b": latency(2.0, "int8")}, {"a": 1.0, "b": 1.0}, True, 0.02)
    assert slow.name == "a" and "no faster" in slow.reason
