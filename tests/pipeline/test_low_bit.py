"""A limit on size: met by cuts and bits together, on the disk, and everything that speaks of it says the same."""

import json

import pytest
import torch
from typer.testing import CliRunner

from convette import load
from convette.cli.main import app
from convette.errors import BudgetError
from convette.layers.quantization import PackedConv2d
from convette.pipeline._run import Run
from convette.pipeline.few_bits import float_budget, limit_of
from convette.pipeline.fit import run_recipe
from convette.pipeline.recipe import build_recipe
from convette.pipeline.results import RunRecord, read_result
from convette.pipeline.run_folder import RunFolder
from convette.pipeline.stages import COMPARE, FIT

QUICK = {
    "model": {"name": "resnet8"},
    "train": {"epochs": 1, "batch_size": 256, "precision": "fp32", "augmentation": []},
    "prune": {"epochs": 1, "steps": 1, "distil": False, "criterion": "l1"},
    "quantize": {"block_steps": 4, "joint_steps": 4, "calibration_images": 40},
    "export": {"formats": ["onnx"]},
    "run": {"engines": ["onnxruntime:cpu"]},
}


def test_fit_meets_a_limit_on_size_with_the_whole_file(tmp_path):
    recipe = tmp_path / "quick.toml"
    recipe.write_text(build_recipe({**QUICK, "explain": {"method": "off"}}).to_toml())
    command = ["fit", "digits", "--recipe", str(recipe), "--budget", "size<=12KB", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--json", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    run = tmp_path / "run"
    file = run / "export" / "model.safetensors"
    written = file.stat().st_size
    assert 10_000 < written <= 12_000 and told["files"]["model"] == str(file)
    rows = {row["key"]: row for row in told["rows"]}
    assert rows["file"]["after"] == written and rows["file"]["budget"] == 12_000 and rows["file"]["met"]
    # Cut as well: in float32 it would be much more.
    compressed = read_result(run, "compress")
    assert sorted(one.bits for one in compressed.tried) == [4, 8] and sum(one.kept for one in compressed.tried) == 1
    best = max(compressed.tried, key=lambda one: (one.accuracy, -one.loss))
    assert best.kept and compressed.path[-1].parameters == best.parameters
    assert 30_000 < compressed.path[-1].size < rows["parameters"]["before"] * 4
    quantized = read_result(run, "quantize")
    assert quantized.kept == "low_bit" and "on the validation split" in quantized.reason
    (exported, onnx) = read_result(run, "export").files
    assert exported.bytes == written
    (check,) = read_result(run, "verify").files
    assert check.engine == "onnxruntime:cpu:int8" and check.passed and check.accuracy is not None
    model = load(file)
    assert any(isinstance(layer, PackedConv2d) for layer in model.modules())
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    # The report and `convette cost` speak of the same bytes.
    report = (run / "report.html").read_text()
    assert "Size of the file" in report
    cost = CliRunner().invoke(app, ["cost", str(file), "--no-latency", "--json", "--quiet"], catch_exceptions=False)
    counted = json.loads(cost.stdout)
    assert counted["size"] == rows["size"]["after"] and counted["file"] == written
    over = [note for note in told["notes"] if "kept by export/model.safetensors" in note]
    assert bool(over) == (onnx.bytes > 12_000)


def run_of(tmp_path, stages=FIT, **tables):
    recipe = build_recipe({**QUICK, **tables})
    record = RunRecord.model_construct(stages=[])
    return Run(recipe, RunFolder(tmp_path, stages, record))


def test_few_bits_are_chosen_where_only_a_size_is_limited(tmp_path):
    assert run_of(tmp_path, budget="size<=30KB").bits_tried == (8, 4)
    assert run_of(tmp_path, budget="size<=30%, macs<=50%").bits_tried == (8, 4)
    assert run_of(tmp_path, budget="size<=30KB", quantize={"bits": 3}).bits_tried == (3,)
    for left in ("macs<=50%", "size<=30KB, latency<=2ms"):
        assert not run_of(tmp_path, budget=left).few_bits
    assert not run_of(tmp_path, budget="size<=30KB", quantize={"mode": "off"}).few_bits
    assert not run_of(tmp_path, budget="size<=30KB", quantize={"method": "int8"}).few_bits
    # `compare` has no stage quantize: then the cuts alone meet the limit.
    assert not run_of(tmp_path, COMPARE, budget="size<=30KB").few_bits
    asked = run_of(tmp_path, budget="macs<=50%", quantize={"method": "low_bit"})
    assert asked.few_bits and asked.bits_tried == ()


def test_the_float_network_has_the_room_its_bits_leave(tmp_path):
    from convette.cost import Budget, Cost

    start = Cost(parameters=250_000, macs=1, size=1_000_000, memory=1)
    budget = Budget.parse("size<=10%, macs<=50%")
    assert limit_of(budget, start) == 100_000 and limit_of(Budget.parse("macs<=50%"), start) is None
    for bits in (8, 4, 2):
        size, macs = float_budget(budget, bits, start).limits
        assert macs == budget.limits[1] and not size.relative
        assert size.value * bits / 32 < 100_000 - 3_000 and size.value * bits / 32 > 85_000


def test_a_size_out_of_reach_is_refused_before_training(tmp_path):
    with pytest.raises(BudgetError, match=r"size<=300B: out of reach with 4 bits a weight.*at the least"):
        run_recipe(build_recipe(QUICK, {"budget.limits": "size<=300B"}), FIT, out=tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()


def test_a_network_trained_with_rounding_ships_as_it_was_measured(tmp_path):
    tables = {**QUICK, "method": ["QuantizationAware; bits=4"], "train": {**QUICK["train"], "learning_rate": 0.01}}
    stages = ("data", "model", "train", "quantize", "export", "verify")
    result = run_recipe(build_recipe(tables), stages, out=tmp_path / "run")
    model = load(result.files["model"])
    assert [layer.bits for layer in model.modules() if isinstance(layer, PackedConv2d)][1:3] == [4, 4]
    assert "trained with rounding" in read_result(tmp_path / "run", "quantize").reason
    verified = read_result(tmp_path / "run", "verify")
    (check,) = verified.files
    assert check.engine == "onnxruntime:cpu:int8" and check.passed
    assert verified.file_after < 0.3 * verified.file_before
    assert verified.test_after.accuracy == verified.test_before.accuracy  # packed, nothing more
