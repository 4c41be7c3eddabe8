"""The command line: exit codes, one line for an error, one JSON object where asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convette._progress import note
from convette.cli.main import app, main

RUN = ["--set", "run.device=cpu"]


def refused(capsys, arguments: list[str]) -> tuple[int, str]:
    """Run a command that must fail and return its exit code and its line."""
    code = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("convette:")]
    assert captured.out == "" and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "remedy"),
    [
        ("fitt", 2, "Did you mean 'fit'?"),
        ("fit digits --epoch 3", 2, "Did you mean '--epochs'?"),
        ("fit digits --epochs three", 2, "--help"),
        ("fit digts", 2, "Did you mean 'digits'?"),
        ("fit digits --model resnt20", 2, "Did you mean 'resnet20'?"),
        ("fit digits --model timm:resnet81", 2, "Did you mean 'timm:resnet18'?|Did you mean"),
        ("fit digits --budget mcas<=40%", 2, "Did you mean 'macs'?"),
        ("fit digits --budget macs<=40", 2, "40%"),
        ("fit digits --set train.epoch=3", 2, "Did you mean 'epochs'?"),
        ("fit digits --set epochs=3", 2, "train.batch_size=64"),
        ("fit digits --set prune.criterion=l3", 2, "l1, l2"),
        ("fit digits --mean a,b", 2, "0.5,0.4,0.3"),
        ("fit digits --max-bad some", 2, "1%"),
        ("fit digits --device gpu", 2, "cuda"),
        ("fit folder:nowhere", 2, "nowhere"),
        ("fit nowhere.toml", 2, "cannot be read"),
        ("prune --model resnet20 --out x.onnx --budget macs<=50%", 2, ".safetensors"),
        ("prune --model resnet20 --out x.safetensors", 2, "--budget"),
        ("prune --model resnet20 --out x.safetensors --budget macs<=50% --criterion l11", 2, "Did you mean 'l1'?"),
        ("cost", 2, "name a network"),
        ("cost resnet20 --engine openvin", 2, "Did you mean 'openvino'?"),
        ("cost resnet20 --no-latency --budget macs<=40%", 2, "absolute"),
        ("export resnet20 --out x.tflite", 2, ".onnx"),
        ("explain resnet20 nowhere.png", 3, "nowhere.png"),
        ("show nowhere.safetensors", 2, "no such file"),
        ("catalogue --room layrs", 2, "Did you mean 'layers'?"),
        ("compare a.toml", 2, "cannot be read"),
    ],
)
def test_a_slip_is_one_line_with_the_remedy(capsys, monkeypatch, tmp_path, arguments, code, remedy):
    monkeypatch.chdir(tmp_path)
    found, line = refused(capsys, arguments.split(" "))
    assert found == code, line
    assert any(part in line for part in remedy.split("|")), line


def test_a_misspelt_class_folder_is_bad_data(capsys, monkeypatch, tmp_path):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "cta"), ("test", "dog")):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    code, line = refused(capsys, ["fit", "folder:photos", "--epochs", "1"])
    assert code in (2, 3) and "cta" in line and "cat" in line


def test_an_impossible_latency_ends_with_four_before_training(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "digits", "--budget", "latency<=1us", "--out", "run", "--quiet", *RUN]
    code, line = refused(capsys, arguments)
    assert code == 4 and "latency" in line and "can go down to" in line
    assert not (tmp_path / "run" / "train").exists()


def test_a_pickle_is_not_unpickled(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"w": Bomb()}, "model.pt")
    assert refused(capsys, ["cost", "model.pt", "--no-latency"])[0] == 2
    assert refused(capsys, ["cost", "resnet20", "--weights", "model.pt", "--no-latency"])[0] == 2
    assert not (tmp_path / "exploded").exists()


def test_json_is_one_object_on_standard_output(capsys):
    assert main(["cost", "resnet20", "--no-latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == 40_551_040
    assert main(["catalogue", "--room", "pruning", "--room", "runtime", "--json"]) == 0
    systems = json.loads(capsys.readouterr().out)["systems"]
    assert {system["room"] for system in systems} == {"pruning", "runtime"}
    assert len({system["slug"] for system in systems}) == len(systems)
    assert main(["recipe", "--json", "--set", "train.epochs=3"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["epochs"] == 3
    assert main(["recipe", "--schema"]) == 0
    assert "budget" in json.loads(capsys.readouterr().out)["properties"]


def test_quiet_lasts_as_long_as_the_command(capsys):
    assert main(["catalogue", "--quiet"]) == 0
    capsys.readouterr()
    note("heard")
    assert "heard" in capsys.readouterr().err


def test_a_printed_recipe_is_a_recipe(capsys, tmp_path):
    assert main(["recipe", "--set", "prune.criterion=lamp"]) == 0
    path = tmp_path / "r.toml"
    path.write_text(capsys.readouterr().out)
    assert main(["recipe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prune"]["criterion"] == "lamp"


def test_prune_show_cost_export_explain_go_hand_in_hand(capsys, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    prune = "prune --model resnet20 --data digits --budget macs<=50% --epochs 1 --set prune.steps=1 --device cpu"
    assert main([*prune.split(" "), "--out", "small.safetensors", "--json", "--quiet"]) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert all(limit["met"] for limit in pruned["limits"]) and not Path("small.safetensors.checkpoint").exists()

    assert main(["show", "small.safetensors"]) == 0
    text = capsys.readouterr().out
    assert "convette:resnet20" in text and "prune" in text and "edit     1." in text

    assert main(["cost", "small.safetensors", "--engine", "eager", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["macs"] == pruned["path"][-1]["macs"] and cost["latency"]

    assert main(["export", "small.safetensors", "--out", "small.onnx", "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["images"] >= 256

    Image.new("L", (16, 16), 128).save("photo.png")
    assert main(["explain", "small.safetensors", "photo.png", "--out", "cam.png"]) == 0
    assert Image.open("cam.png").size == (320, 320)


def test_every_verb_has_help_and_the_common_options_are_spelt_alike():
    from typer.main import get_command

    commands = get_command(app).commands
    assert set(commands) == {
        "fit", "train", "prune", "quantize", "split", "cost", "export", "explain", "compare", "show", "catalogue",
        "recipe"
    }  # fmt: skip
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert command.help and {"--json", "--quiet", "--debug"} <= options, name
        if name in ("fit", "train", "prune"):
            assert {"--model", "--epochs", "--recipe", "--seed", "--device", "--out", "--weights"} <= options, name


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from convette.cli.main import main; main(['--help']); "
        "print(','.join(m for m in ('torch', 'numpy', 'pydantic', 'openvino') if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "" and "fit" in done.stdout


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    from convette.errors import UsageError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        main(["show", "nowhere.safetensors", "--debug"])


def test_show_units_says_and_draws_what_goes_together(capsys, tmp_path):
    picture = tmp_path / "units.svg"
    assert main(["show", "resnet20", "--units", "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("12 groups") and "layer1.0.conv1: 16 channels" in text
    assert picture.read_text().startswith("<svg")
    assert main(["show", "resnet20", "--units", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) == 12
    assert main(["show", "resnet20", "--out", str(picture)]) == 2
    assert main(["show", "resnet21", "--units"]) == 2
