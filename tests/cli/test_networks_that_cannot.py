"""An unknown operator, a size written into Python, a network that cannot be exported: one clear line each."""

import sys

import pytest
import torch

from convette import surgery
from convette.cli.main import main
from convette.errors import StructureError
from convette.models import create_model

CODE = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, num_classes, 1)

    def forward(self, x):
        return self.c(torch.fft.fft(self.b(self.a(x)), dim=1).real).mean((2, 3))


class Literal(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, num_classes)

    def forward(self, x):
        y = self.a(x).mean((2, 3))
        if y.shape[1] != 8:
            raise RuntimeError("eight channels, please")
        return self.b(y)


class Branching(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, num_classes)

    def forward(self, x):
        y = self.a(x).mean((2, 3))
        if float(y.sum()) > 0:
            y = y * 2
        return self.b(y)


class Narrow(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.a = nn.Linear(7, num_classes)

    def forward(self, x):
        return self.a(x)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cannot_nets.py").write_text(CODE)
    yield "cannot_nets"
    sys.modules.pop("cannot_nets", None)


def line_of(text):
    return next(number for number, line in enumerate(CODE.splitlines(), 1) if text in line)


def said(capsys, arguments):
    code = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("convette: "), lines
    return code, lines[0]


def test_an_unknown_operator_is_named_with_its_line(module, capsys):
    assert main(["show", f"{module}:Odd", "--units"]) == 0
    text = capsys.readouterr().out
    assert "fft_fft" in text and f"cannot_nets.py:{line_of('fft.fft')}" in text and "a: 8 channels" in text


def test_a_width_the_code_insists_on_is_one_line_and_nothing_is_written(module, capsys, tmp_path):
    command = ["prune", f"{module}:Literal", "--budget", "macs<=50%", "--criterion", "l1", "--epochs", "0", "-q"]
    code, line = said(capsys, command)
    assert code == 2, line
    assert f"cannot_nets.py:{line_of('eight channels')}" in line and "eight channels, please" in line
    assert {path.name for path in tmp_path.iterdir()} <= {"cannot_nets.py", "__pycache__"}


def test_the_model_is_as_before(module, tmp_path):
    model = create_model(f"{module}:Literal").eval()
    images = torch.randn(1, 3, 8, 8)
    before, state = model(images), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = surgery.trace(model, images)
    with pytest.raises(StructureError, match="eight channels, please"):
        surgery.apply(model, graph.shrink({"a": torch.tensor([1, 2])}), example=images, prove=True)
    assert torch.equal(model(images), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_network_that_cannot_be_exported_is_one_line_with_the_place(module, capsys, tmp_path):
    code, line = said(capsys, ["export", f"{module}:Branching", "--out", "net.onnx", "--quiet"])
    assert code == 1 and f"cannot_nets.py:{line_of('float(y.sum())')}" in line and "Branching" in line
    assert not list(tmp_path.glob("net*"))


def test_a_network_that_runs_on_no_image_is_one_line(module, capsys):
    code, line = said(capsys, ["show", f"{module}:Narrow", "--units"])
    assert code == 1 and "does not run on the example" in line
    budget = ["--budget", "macs<=50%", "--criterion", "l1", "--epochs", "0", "-q"]
    code, line = said(capsys, ["prune", f"{module}:Narrow", *budget])
    assert code == 2 and "runs on no image" in line
