"""Recipes that convert: what they accept and refuse, on the command line too, and the run that comes of one."""

import pytest
import torch

import convette
from convette.data import load_data
from convette.errors import UsageError
from convette.layers.normalization import SparseSwitchNorm2d
from convette.pipeline import build_recipe, load_recipe, read_result, run_recipe
from convette.pipeline.conversion import training_methods
from convette.pipeline.stages import FIT
from convette.pipeline.stages.export import unfolded_lines
from convette.surgery import structure_log
from convette.training import NormLossTraining, SparseSwitch


def written(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


SWITCH = '[[convert]]\nreplace = "BatchNorm2d"\nby = "sparse-switchable-normalization"\n'


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (SWITCH + '\n[[convert]]\nreplace = "BatchNorm2d"\nby = "bnett"\n', 7, "Did you mean 'bnet'?"),
        (SWITCH + 'where = "stage:2, last in blok"\n', 4, "Did you mean 'last in block'?"),
        (SWITCH + 'wher = "stage:2"\n', 4, "Did you mean 'where'?"),
        (SWITCH + "options = { momentun = 0.1 }\n", 1, "Did you mean 'momentum'?"),
        ('[data]\nsource = "digits"\n[[convert]]\nby = "bnet"\n', 3, "say what it replaces"),
        ('[train]\nepochs = 2\n[[method]]\nname = "norm-los"\n', 4, "Did you mean 'norm-loss'?"),
        ('[[method]]\nname = "norm-loss"\noptions = { wait = 1 }\n', 1, "Did you mean 'weight'?"),
        ("convert = 3\n", 1, "convert = 3"),
        ('convert = ["BatchNorm2d=bnet; k"]\n', 1, "key=value"),
    ],
)
def test_an_error_in_a_step_names_its_line_and_what_would_work(tmp_path, text, line, words):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ") and words in str(caught.value)


def test_a_step_may_be_a_table_or_a_line_and_survives_being_written(tmp_path):
    long = (
        '[[convert]]\nreplace = "BatchNorm2d"\nby = "bnet"\nwhere = ["stage:1", "last in block"]\noptions = { k = 5 }\n'
    )
    short = 'convert = "BatchNorm2d=bnet; where=stage:1, last-in-block; k=5"\n'
    recipe = load_recipe(written(tmp_path, long))
    assert recipe == load_recipe(written(tmp_path, short))
    assert recipe == load_recipe(written(tmp_path, recipe.to_toml())) == build_recipe(recipe.tables())
    assert recipe.digest() != build_recipe().digest()
    more = load_recipe(written(tmp_path, long), {"convert": ["weight-align"], "method": ["norm-loss"]})
    assert [step.by for step in more.convert.steps] == ["bnet", "weight-align"]
    assert [step.name for step in more.method.steps] == ["norm-loss"]


def test_layers_bring_their_training_method_along_unless_told_not_to(tmp_path):
    recipe = load_recipe(written(tmp_path, SWITCH + '[[method]]\nname = "norm-loss"\n'))
    model, data = torch.nn.Sequential(SparseSwitchNorm2d(3)), load_data("digits")
    assert [type(one) for one in training_methods(recipe, model, data)] == [NormLossTraining, SparseSwitch]
    off = load_recipe(written(tmp_path, SWITCH + 'method = "off"\n'))
    assert training_methods(off, model, data) == []
    own = load_recipe(written(tmp_path, SWITCH + '[[method]]\nname = "SparseSwitch"\noptions = { clip = 2.0 }\n'))
    assert [one.clip for one in training_methods(own, model, data)] == [2.0]


def test_a_run_converts_trains_prunes_folds_and_exports_what_agrees(tmp_path):
    recipe = build_recipe(
        {
            "budget": "macs<=60%",
            "data": {"validation_fraction": 0.1, "test_fraction": 0.7},
            "model": {"name": "resnet20"},
            "convert": ["BatchNorm2d=sparse-switchable-normalization; where=stage:1, first in stage", "weight-align"],
            "train": {"epochs": 1, "batch_size": 128},
            "prune": {"epochs": 1, "steps": 1},
            "quantize": {"mode": "off"},
            "export": {"formats": ["onnx"], "verify_images": 256},
            "explain": {"method": "off"},
            "report": {"enabled": False},
            "run": {"engines": ["onnxruntime:cpu"]},
        }
    )
    result = run_recipe(recipe, FIT, out=tmp_path / "run")
    assert any(note.startswith("Converted before training: weight-align") for note in result.summary.notes)
    assert [line.split(":")[0] for line in read_result(tmp_path / "run", "model").converted] == [
        "BatchNorm2d by sparse-switchable-normalization at stage",
        "weight-align",
    ]
    trained = convette.load(tmp_path / "run/train/model.safetensors")
    switches = [module for module in trained.modules() if isinstance(module, SparseSwitchNorm2d)]
    assert len(switches) == 1 and all(module.choice() is not None for module in switches)
    kinds = [edit.kind for edit in structure_log(convette.load(tmp_path / "run/export/model.safetensors")).edits]
    assert kinds[:2] == ["convert", "install"] and "shrink" in kinds
    exported = read_result(tmp_path / "run", "export")
    assert all("parametriz" not in name for name in exported.unfolded)
    check = read_result(tmp_path / "run", "verify").files[0]
    assert check.passed and check.agreement > 0.99


def test_layers_that_stay_are_told_in_one_line_a_kind():
    kept = {f"layer{i}.gather": f"Gather: {i} of the 16 channels of a stream are used." for i in (9, 10, 11)}
    lines = unfolded_lines({**kept, "a.norm": "Norm: reads its batch.", "b.norm": "Norm: reads its batch."})
    assert lines == [
        "layer9.gather and 2 more: Gather: 9 of the 16 channels of a stream are used. The others alike.",
        "a.norm and 1 more: Norm: reads its batch.",
    ]
    assert unfolded_lines({}) == []
