"""`convette split`: a bottleneck trained, cut, timed over a link, written."""

import json

import pytest
import torch

import convette
from convette.cli.main import main
from convette.pipeline import edge
from convette.runtime import read_export_metadata
from convette.runtime.edge_split import EdgeClient


def test_a_network_is_split_trained_timed_and_written(tmp_path, capsys):
    model = convette.create_model("resnet8", in_channels=1, seed=0).eval()
    data = convette.load_data("digits")
    card = convette.surgery.ModelCard(preprocessing=data.preprocessing.to_json())
    convette.save(convette.surgery.set_card(model, card), tmp_path / "model.safetensors")
    words = ["split", str(tmp_path / "model.safetensors"), "--at", "layer1", "--features", "layer2, layer3"]
    words += ["--bottleneck", "2", "--width", "4", "--epochs", "1", "--rate", "1e6", "--latency", "0"]
    assert main([*words, "--out", str(tmp_path / "parts"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == {"local", "remote", "split"} and found["fallbacks"] == 0
    # 8x8 images: 64 raw bytes, 2 x 12 x 12 across; a header of 16, 4 a dimension, 4 for the length.
    assert (found["bytes_image"], found["bytes_sent"]) == (64 + 36, 288 + 36)
    assert found["whole_macs"] > 0 and found["accuracy_after"] >= 0.05
    assert [read_export_metadata(path) is not None for path in found["files"]] == [True, True]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    model = convette.create_model("resnet8", in_channels=1, seed=0).eval()
    card = convette.surgery.ModelCard(preprocessing=convette.load_data("digits").preprocessing.to_json())
    path = tmp_path_factory.mktemp("split") / "model.safetensors"
    convette.save(convette.surgery.set_card(model, card), path)
    return path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--at", "layer9"], 1, "Those that can: conv1"),
        (["--at", "layer1", "--features", "layr2"], 1, "Did you mean 'layer2'"),
        (["--at", "layer1", "--rate", "0"], 2, "rate = 0"),
        (["--at", "layer1", "--latency", "-1"], 2, "latency = -1"),
        (["--at", "layer1", "--out", "FILE"], 2, "names a folder"),
        (["--at", "layer1", "--filter", "zero"], 2, "--filter 'zero' is no class of the images. Known: 0, 1"),
        (["--at", "layer1", "--filter", "0", "--recall", "0"], 2, "--recall 0"),
        (["--at", "layer1", "--jpeg", "96"], 2, "quality of 96"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(network, words, code, message, capsys):
    words = [str(network) if word == "FILE" else word for word in words]
    before = network.read_bytes()
    assert main(["split", str(network), *words]) == code
    found = capsys.readouterr()
    assert message in found.err and len(found.err.splitlines()) == 1 and not found.out
    assert network.read_bytes() == before


def test_a_network_of_other_classes_or_broken_weights_is_refused(network, tmp_path, capsys):
    other = convette.create_model("resnet8", in_channels=1, num_classes=3, seed=0)
    card = convette.surgery.card_of(convette.load(network))
    convette.save(convette.surgery.set_card(other, card), tmp_path / "other.safetensors")
    assert main(["split", str(tmp_path / "other.safetensors"), "--at", "layer1"]) == 2
    assert "gives 3 outputs, the images have 10 classes" in capsys.readouterr().err
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] = float("nan")
    convette.save(other, tmp_path / "other.safetensors")
    assert main(["split", str(tmp_path / "other.safetensors"), "--at", "layer1"]) == 1
    assert "'conv1.weight' holds values that are not finite" in capsys.readouterr().err


def test_a_slow_link_is_waited_for_and_bytes_are_those_of_messages(network, monkeypatch):
    """A message may take longer than connecting may; bytes are stated even where the link failed."""
    data, model = convette.load_data("digits"), convette.load(network)
    shape = data.preprocessing
    parts = edge.cut(
        edge.inject(model, "layer1", shape(data.train.images([0])), 2, 4).eval(),
        shape(data.train.images([0])),
        "layer1.encoder",
    )
    taken = []
    monkeypatch.setattr(
        edge, "EdgeClient", lambda *words, timeout: taken.append(timeout) or EdgeClient(*words, timeout=timeout)
    )
    ends = edge._Ends(model, parts.head, parts.tail, shape)
    seconds, sizes, failures = edge._timed(ends, data, 2e4, 0.0)
    assert not failures and sizes == {"remote": 100, "split": 2 * 12 * 12 + 36} and min(taken) > 30
    assert seconds["remote"] > 100 / 2e4

    class Broken(edge.ShapedLink):
        def __enter__(self):
            self.broken = True
            return super().__enter__()

    monkeypatch.setattr(edge, "ShapedLink", Broken)
    _, sizes, failures = edge._timed(ends, data, 1e6, 0.0)
    assert len(failures) == 40 and failures[0] and sizes["split"] == 324


def test_the_filter_and_jpeg_stand_in_the_table(network, tmp_path, capsys):
    words = ["split", str(network), "--at", "layer1", "--bottleneck", "2", "--width", "4", "--epochs", "1"]
    words += ["--rate", "1e6", "--latency", "0", "--filter", "0", "--recall", "0.9", "--jpeg", "60", "--quiet"]
    assert main([*words, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == ["local", "remote", "remote, JPEG 60", "split", "split, filter"]
    kept = ways["split, filter"]["answered_here"]
    # A tenth of the images are of class 0; up to about a tenth of the others may be kept back.
    assert 0.02 < kept < 0.35 and 0 < found["filter_threshold"] < 1
    assert ways["split, filter"]["bytes_sent"] == pytest.approx((1 - kept) * ways["split"]["bytes_sent"])
    # Such an untrained network is nearly always wrong on what the filter answers by itself.
    assert ways["split, filter"]["accuracy"] > ways["split"]["accuracy"]
    # 64 pixels as JPEG are mostly its header.
    assert ways["remote, JPEG 60"]["bytes_sent"] > ways["remote"]["bytes_sent"]
    assert [path.rpartition("/")[2] for path in found["files"]] == ["head.onnx", "tail.onnx", "filter.onnx"]
    rows = tuple(edge.Way(**way) for way in found["ways"])
    shown = edge.SplitOutcome(**{**found, "ways": rows, "files": ()}).text().splitlines()
    assert shown[1].split() == ["right", "answered", "here", "bytes", "sent", "ms"] and "keeps back" in shown[-1]
    assert len({len(line) for line in shown[1:7]}) == 1
