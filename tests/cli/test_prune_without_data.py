"""``convette prune NAME --epochs 0``: cut to a budget with nothing but an example."""

import json
from pathlib import Path

import torch

from convette.cli.main import main
from convette.models import load


def test_a_library_network_is_cut_in_one_line_and_its_file_reloads(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["prune", "timm:test_resnet", "--budget", "macs<=50%", "--criterion", "l1", "--epochs", "0"]
    assert main([*command, "--json", "--quiet"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["file"] == "test_resnet-pruned.safetensors"
    assert done["accuracy_before"] is None and done["accuracy_after"] is None
    assert done["path"][-1]["macs"] <= 0.5 * done["path"][0]["macs"]
    model = load(done["file"])
    with torch.no_grad():
        assert model(torch.randn(1, 3, 160, 160)).shape == (1, 10)
    assert main([*command, "--out", "small.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("small.safetensors: macs")


def test_what_cannot_be_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget = ["--budget", "macs<=50%", "--epochs", "0"]
    for arguments, said in (
        (["timm:test_resnet", *budget, "--criterion", "taylor"], "criterion taylor needs a data set"),
        (["timm:test_resnet", "--model", "resnet20", *budget], "two networks were given"),
        (["timm:test_resnett", *budget, "--criterion", "l1"], "Did you mean 'test_resnet'?"),
        (["timm:test_resnet", "--criterion", "l1", "--epochs", "0"], "--budget"),
        ([*budget, "--criterion", "l1"], "prune needs a network"),
    ):
        assert main(["prune", *arguments, "--quiet"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0]
    assert not list(Path().iterdir())
