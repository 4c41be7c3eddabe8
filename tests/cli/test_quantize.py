"""``convette quantize``: few bits into a file of a given size, int8 with every observer; what cannot be is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

from convette import create_model, load, save
from convette.cli.main import app, main


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    model = create_model("resnet8", in_channels=1, seed=0)
    with torch.no_grad():
        model.train()(torch.randn(64, 1, 8, 8))
    path = tmp_path_factory.mktemp("networks") / "net.safetensors"
    save(model, path)
    return path


def quantized(*arguments):
    settings = ["--set", "quantize.block_steps=2", "--set", "quantize.joint_steps=2", "--images", "24"]
    command = ["quantize", *map(str, arguments), *settings, "--json", "--quiet", "--data", "digits"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_few_bits_into_a_file_of_a_given_size(network, tmp_path):
    out = tmp_path / "small.safetensors"
    told = quantized(network, "--out", out, "--budget", "size<=28KB", "--observer", "percentile")
    assert told["bytes"] == out.stat().st_size and 26_000 < told["bytes"] <= 28_000
    assert "bits" in told["text"] and 0 <= told["accuracy_after"] <= 1
    assert load(out)(torch.randn(1, 1, 8, 8)).shape == (1, 10)


def test_every_observer_makes_another_int8_file(network, tmp_path):
    files = {}
    for observer in ("min_max", "percentile", "mse"):
        out = tmp_path / f"{observer}.onnx"
        told = quantized(network, "--out", out, "--observer", observer)
        assert observer in told["text"] and told["bytes"] == out.stat().st_size
        files[observer] = out.read_bytes()
    assert len(set(files.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.pt"], "can be written"),
        (["--out", "x.onnx", "--budget", "size<=9KB"], "limit on the size of a .safetensors"),
        (["--out", "x.safetensors", "--budget", "macs<=9K"], "limit on the size"),
        (["--out", "x.safetensors", "--images", "1"], "at least 2"),
        (["--out", "x.safetensors", "--observer", "mean"], "not one of"),
    ],
)
def test_what_cannot_be_is_refused(network, arguments, message, capsys):
    assert main(["quantize", str(network), *arguments]) == 2
    assert message in capsys.readouterr().err
