"""``convette quantize``: few bits into a file of a given size, int8 with every observer; what cannot be is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

from convette import create_model, load, save
from convette.cli.main import app, main
from convette.errors import UsageError
from convette.pipeline.inspect import check_network
from convette.quantization import LowBitSettings, low_bit


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


def refused(capsys, *words):
    code = main(["quantize", *map(str, words), "--data", "digits"])
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and not told.out
    return code, told.err


def test_networks_that_cannot_be_quantised_are_named_and_files_stay(network, tmp_path, capsys):
    before, out = network.read_bytes(), tmp_path / "out.safetensors"
    assert "would be lost" in refused(capsys, network, "--out", network)[1] and network.read_bytes() == before
    assert "file for an engine" in refused(capsys, "model.onnx", "--out", out)[1]
    broken = load(network)
    with torch.no_grad():
        broken.conv1.weight[0, 0, 0, 0] = float("nan")
    save(broken, tmp_path / "broken.safetensors")
    code, told = refused(capsys, tmp_path / "broken.safetensors", "--out", out)
    assert code == 1 and "'conv1.weight' holds values that are not finite" in told
    few = low_bit(load(network), torch.randn(8, 1, 8, 8), LowBitSettings(block_steps=0, joint_steps=0))
    save(few.model, tmp_path / "few.safetensors")
    capsys.readouterr()
    assert "in few bits already" in refused(capsys, tmp_path / "few.safetensors", "--out", out)[1]
    assert not out.exists()


def test_a_network_too_large_for_the_images_says_so(capsys):
    example = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UsageError, match=r"net does not run on images of 1x2x2: .*data\.image_size"):
        check_network(torch.nn.Conv2d(1, 1, 3), "net", example)


@pytest.mark.parametrize("verb", ["train", "prune"])
def test_train_and_prune_say_so_too(verb, tmp_path, capsys, monkeypatch):
    large = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 11), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    monkeypatch.setattr("convette.models.create_model", lambda *words, **named: large)
    words = ["--model", "resnet20", "--set", "data.source=digits"]
    more = {"train": ["--out", str(tmp_path / "run")], "prune": ["--out", str(tmp_path / "x.safetensors")]}[verb]
    more += ["--budget", "macs<=50%"] if verb == "prune" else []
    assert main([verb, *words, *more, "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "resnet20 does not run on images of 1x8x8: " in told and len(told.splitlines()) == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_a_value_that_is_none_of_those_known_lists_them_once(capsys):
    assert main(["quantize", "resnet20", "--out", "x.safetensors", "--observer", "zzz"]) == 2
    told = capsys.readouterr().err
    assert told.count("min_max") == 1 and "not one of" in told and "Known" not in told


def test_a_run_folder_is_a_trained_network(network, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "train").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "train" / "model.safetensors").write_bytes(network.read_bytes())
    words = ["--out", str(tmp_path / "x.safetensors"), "--set", "quantize.block_steps=0", "--images", "40"]
    assert main(["quantize", str(run), *words, "--set", "quantize.joint_steps=0", "--bits", "5"]) == 0
    told = capsys.readouterr()
    assert "untrained" not in told.err and "layers in 5 bits, 2 layers in 8 bits, weights" in told.out


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
