import copy
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from convette.errors import ConvetteError, DataError, UsageError
from convette.quantization import quantize_onnx, quantize_openvino
from convette.runtime import export, exported_size, prepare, read_export_metadata, verify


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_int8_agrees_with_the_network_and_is_smaller(engine, int8_files, net, images):
    path = int8_files[engine]
    found = verify(path, net, images)
    assert found.precision == "int8" and found.engine == f"{engine}:cpu:int8"
    assert found.passed and found.agreement > 0.95
    assert 1e-4 < found.max_relative_error < 0.3, "int8 rounds, but not wildly"
    weights = {".xml": ".bin"}.get(path.suffix, path.suffix)
    plain = path.with_name("float").with_suffix(weights).stat().st_size
    assert path.with_suffix(weights).stat().st_size < 0.6 * plain
    assert exported_size(path) >= path.stat().st_size


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_int8_file_knows_what_it_is(engine, int8_files, images):
    path = int8_files[engine]
    metadata = read_export_metadata(path)
    assert metadata["precision"] == "int8" and metadata["input_shape"] == [1, 8, 8]
    for text in (f"{engine}:cpu", f"{engine}:cpu:int8"):
        with prepare(text, path, images[:1]) as runner:
            assert runner.precision == "int8"
            assert runner(images[:5]).shape == (5, 10)


def test_int8_path_serves_a_module(int8_files, net, images):
    with prepare("openvino:cpu:int8", net, images[:1], int8_path=int8_files["openvino"]) as runner:
        assert runner.precision == "int8"


def test_onnx_is_qdq_with_uint8_activations_and_weights_per_channel(int8_files):
    model = onnx.load(int8_files["onnxruntime"])
    onnx.checker.check_model(model)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantised = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {constants[node.input[2]].dtype for node in quantised} == {np.dtype(np.uint8)}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    channels = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = dequantised[node.input[1]]
            assert constants[weight.input[0]].dtype == np.int8
            assert constants[weight.input[1]].shape == constants[weight.input[0]].shape[:1]
            channels.append(len(constants[weight.input[1]]))
    assert sorted(channels) == [16, 32, 32]


def both(net, images, calibration, folder):
    """Try both quantisers on `calibration`; yields what each raises."""
    plain = export(net, images[:1], folder / "plain.onnx")
    for work in (
        lambda: quantize_openvino(net, images[:1], calibration, folder / "int8.xml"),
        lambda: quantize_onnx(plain, calibration, folder / "int8.onnx"),
    ):
        with pytest.raises(ConvetteError) as caught:
            work()
        assert "\n" not in str(caught.value)
        yield caught.value
    assert [path.name for path in folder.iterdir()] == ["plain.onnx"], "nothing may be written"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: [], r"0 image\(s\); .* at least 2"),
        (lambda images: [images[:1]], r"1 image\(s\); .* at least 2"),
        (lambda images: [images[:1].expand(40, -1, -1, -1)], "all the same"),
        (lambda images: [torch.full_like(images[:40], 0.5)], "all the same"),
        (lambda images: [images[:3], images[3:6] / 0], r"image 3 holds values that are not finite"),
    ],
)
def test_calibration_images_that_teach_nothing_are_refused(spoil, message, net, images, tmp_path):
    for error in both(net, images, spoil(images), tmp_path):
        assert isinstance(error, DataError)
        with pytest.raises(DataError, match=message):
            raise error


def test_a_network_with_nan_is_refused(net, images, calibration, tmp_path):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ConvetteError, match=r"conv\.weight .* not finite"):
        quantize_openvino(broken, images[:1], calibration, tmp_path / "int8.xml")
    path = export(net, images[:1], tmp_path / "nan.onnx")
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, path)
    with pytest.raises(ConvetteError, match=r"nan\.onnx gives values that are not finite"):
        quantize_onnx(path, calibration, tmp_path / "int8.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.onnx"]


def test_constant_activations_are_no_obstacle(net, images, calibration, tmp_path):
    """Channels that are always zero have no range; the rest of the network is quantised all the same."""
    dead = copy.deepcopy(net)
    with torch.no_grad():
        dead.norm1.weight[:4] = 0
        dead.norm1.bias[:4] = 0
        dead.norm3.weight.zero_()
        dead.norm3.bias.zero_()
    plain = export(dead, images[:1], tmp_path / "dead.onnx")
    for path in (
        quantize_openvino(dead, images[:1], calibration, tmp_path / "dead.xml"),
        quantize_onnx(plain, calibration, tmp_path / "dead.int8.onnx"),
    ):
        assert verify(path, dead, images).passed


def test_few_calibration_images_are_told(net, images, tmp_path, capfd):
    quantize_openvino(net, images[:1], [images[:8]], tmp_path / "few.xml")
    out, err = capfd.readouterr()
    assert out == "" and err == ("calibration on only 8 images: the ranges may be too narrow; 128 to 300 are usual.\n")


def test_the_network_is_left_as_it_was(net, images, calibration, tmp_path):
    before = copy.deepcopy(net.state_dict())
    quantize_openvino(net, images[:1], calibration, tmp_path / "a.xml")
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_wrong_suffixes_are_refused(net, images, calibration, int8_files, tmp_path):
    with pytest.raises(UsageError, match=r"\.xml"):
        quantize_openvino(net, images[:1], calibration, tmp_path / "a.onnx")
    with pytest.raises(UsageError, match=r"\.onnx"):
        quantize_onnx(int8_files["onnxruntime"], calibration, tmp_path / "a.xml")


_SILENT = """
import socket, sys, torch
def refuse(*arguments, **options):
    raise SystemExit("somebody opened a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from convette.quantization import quantize_openvino
from convette.runtime import prepare
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
images = torch.randn(40, 1, 4, 4)
path = quantize_openvino(model, images[:1], [images], "model.xml")
prepare("openvino:cpu", path, images[:1])(images)
assert sys.modules["openvino_telemetry"] is None
"""


def test_nothing_phones_home_or_writes_there(tmp_path):
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir(), work.mkdir()
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI", "PYTEST_CURRENT_TEST")
    }
    done = subprocess.run(
        [sys.executable, "-c", _SILENT],
        cwd=work,
        env={**environment, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in work.iterdir()) == ["model.bin", "model.xml"]
    assert list(home.iterdir()) == []
