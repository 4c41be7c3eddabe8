"""`convette split`: a bottleneck trained, cut, timed over a link, written."""

import json

import convette
from convette.cli.main import main
from convette.runtime import read_export_metadata


def test_a_network_is_split_trained_timed_and_written(tmp_path, capsys):
    model = convette.create_model("resnet20", in_channels=1, seed=0).eval()
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


def test_a_stage_that_cannot_be_is_named(capsys):
    assert main(["split", "resnet20", "--at", "layer9", "--data", "digits", "--epochs", "0"]) == 1
    assert "layer9" in capsys.readouterr().err
