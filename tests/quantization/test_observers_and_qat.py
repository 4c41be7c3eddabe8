"""Observers of the engines' own quantisers, and training with rounding whose exported file is the measured one."""

import copy

import pytest
import torch

from convette.errors import UsageError
from convette.layers.quantization import QuantConv2d, group_scales
from convette.quantization import QuantizationAware, QuantizeSettings, quantize_layers, quantize_onnx, quantize_openvino
from convette.runtime import export, prepare


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_onnx_runtime_takes_every_observer(net, images, calibration, digits, evaluate_digits, tmp_path, observer):
    plain = export(net, images[:1], tmp_path / "float.onnx")
    files = {
        name: quantize_onnx(plain, calibration, tmp_path / f"{name}.onnx", observer=name)
        for name in (observer, "min_max")
    }
    scores = {}
    for name, path in files.items():
        with prepare("onnxruntime:cpu:int8", path, images[:1]) as runner:
            scores[name] = evaluate_digits(runner, digits.validation, digits.preprocessing).accuracy
    assert abs(scores[observer] - scores["min_max"]) < 0.03
    if observer != "entropy":  # which keeps the whole range where nothing lies far out, as here
        assert files[observer].read_bytes() != files["min_max"].read_bytes()


@pytest.mark.parametrize("observer", ["min_max", "percentile"])
def test_openvino_takes_the_observers_it_has(net, images, calibration, digits, evaluate_digits, tmp_path, observer):
    path = quantize_openvino(net, images[:1], calibration, tmp_path / "int8.xml", observer=observer)
    with prepare("openvino:cpu:int8", path, images[:1]) as runner:
        assert evaluate_digits(runner, digits.validation, digits.preprocessing).accuracy > 0.85


def test_an_observer_nobody_has_is_refused(net, images, calibration, tmp_path):
    with pytest.raises(UsageError, match=r"NNCF.*percentile"):
        quantize_openvino(net, images[:1], calibration, tmp_path / "x.xml", observer="mse")
    with pytest.raises(UsageError, match="ONNX Runtime offers"):
        quantize_onnx(tmp_path / "a.onnx", calibration, tmp_path / "b.onnx", observer="mean")
    with pytest.raises(UsageError, match=r"onnxruntime:cpu"):
        QuantizeSettings(observer="mse")
    assert QuantizeSettings(observer="mse", engines=("onnxruntime:cpu",)).observer == "mse"
    for wrong in ({"bits": 1}, {"activation_bits": 1}, {"scale_groups": 0}):
        with pytest.raises(UsageError, match=r"quantize\."):
            QuantizeSettings(**wrong)


def test_quantised_layers_stay_close_at_eight_bits(net, images, calibration):
    model = copy.deepcopy(net).eval()
    with torch.no_grad():
        expected = model(images[:64])
        quantize_layers(model, images[:2], torch.cat(calibration))
        found = model(images[:64])
    assert isinstance(model.conv, QuantConv2d) and not isinstance(model.norm2, torch.nn.BatchNorm2d)
    assert ((found - expected).square().mean() / expected.square().mean()) < 0.01


def test_training_with_rounding_and_the_file_it_ships(net, tmp_path):
    from convette.data import load_data
    from convette.training import TrainSettings, evaluate, evaluate_runner, train

    data, model = load_data("digits"), copy.deepcopy(net)
    before = evaluate(model, data.validation, data.preprocessing).accuracy
    settings = TrainSettings(
        epochs=1, learning_rate=0.005, batch_size=64, ema_decay=0.5, warmup_epochs=0, precision="fp32", augmentation=()
    )
    result = train(model, data, settings, methods=[QuantizationAware(4, 4)])
    assert [model.stem.bits, model.conv.bits, model.conv3.bits, model.head.bits] == [8, 4, 4, 8]
    fitted, group = group_scales(model.conv3.weight, 4)
    assert not torch.allclose(model.conv3.scales(), fitted[group], rtol=1e-3)  # learned, not only fitted
    assert result.validation_accuracy >= before - 0.05
    example = data.preprocessing(data.train.images([0]))
    path = export(model, example, tmp_path / "aware.onnx")
    expected = evaluate(model, data.validation, data.preprocessing)
    with prepare("onnxruntime:cpu", path, example) as runner:
        found = evaluate_runner(runner, data.validation, data.preprocessing)
    assert runner.precision == "int8"
    assert float((found.predictions == expected.predictions).float().mean()) > 0.95
    with pytest.raises(UsageError, match="2 to 8"):
        QuantizationAware(bits=1)
