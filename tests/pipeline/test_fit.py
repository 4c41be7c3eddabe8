"""`fit` from end to end on the digits: small, real, and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import convette
from convette.errors import BudgetError, DataError, UsageError
from convette.pipeline import build_recipe, fit, read_outcome, read_result, read_run, train_run
from convette.pipeline.stages import FIT

TINY = {
    "budget": "macs<=40%",
    "train": {"epochs": 2, "batch_size": 256},
    "prune": {"steps": 2, "epochs": 2},
    "quantize": {"mode": "auto", "time_limit": 0.2, "calibration_images": 32, "engines": ["onnxruntime:cpu"]},
    "export": {"formats": ["onnx"]},
    "explain": {"images": 2},
    "run": {"device": "cpu", "engines": ["onnxruntime:cpu"]},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)
    return fit(recipe=build_recipe(TINY), out=tmp_path_factory.mktemp("fit") / "run")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return convette.load(run_dir / "export" / "model.safetensors").state_dict()


def test_a_run_ends_with_everything_it_promises(undisturbed):
    run_dir = undisturbed.run_dir
    assert undisturbed.met and undisturbed["macs"] <= 0.4 * undisturbed.summary.rows[1].before
    assert {"model", "onnx", "recommended", "report"} <= set(undisturbed.files)
    assert all(path.exists() for path in undisturbed.files.values())
    record = read_run(run_dir)
    assert [stage.state for stage in record.stages] == ["finished"] * len(FIT)
    assert all(stage.seconds > 0 for stage in record.stages)
    verified = read_result(run_dir, "verify")
    assert all(check.passed and check.images >= 256 for check in verified.files)
    assert sum(map(sum, verified.test_after.confusion)) == verified.test_after.images == 359
    with np.load(run_dir / "verify" / "predictions.npz") as arrays:
        right = (arrays["labels"] == arrays["after"]).mean()
    assert right == pytest.approx(verified.test_after.accuracy)
    compressed = read_result(run_dir, "compress")
    assert [point.step for point in compressed.path] == [0, 1, 2]
    assert len(compressed.recovery) == 2 and any(width.after < width.before for width in compressed.widths)
    assert len(read_result(run_dir, "train").epochs) == 2
    table = undisturbed.table()
    assert "Test accuracy" in table and "met" in table
    assert json.dumps(undisturbed.to_json(), allow_nan=False)


def test_no_leftovers_and_no_checkpoints_remain(undisturbed):
    names = [path.name for path in undisturbed.run_dir.rglob("*")]
    assert not [name for name in names if name == "checkpoint" or name.startswith(".")]


def test_the_same_call_again_does_nothing_and_says_so(undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.run_dir.rglob("*") if path.is_file()}
    again = fit(recipe=build_recipe(TINY), out=undisturbed.run_dir)
    assert again == undisturbed
    changed = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert set(changed) <= {"run.lock"}
    assert "skipped, finished before: data, model, train, compress" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_weights(undisturbed, tmp_path):
    run_dir, recipe = tmp_path / "run", tmp_path / "r.toml"
    build_recipe(TINY).save(recipe)
    command = [sys.executable, "-m", "convette", "fit", "--recipe", str(recipe), "--out", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # In these the process is killed late, with work of the stage done; in the others as soon as they begin.
    begun = {"train": "train/checkpoint/*", "compress": "compress/checkpoint/*"}
    killed = []
    for stage in ("model", "train", "compress", "quantize", "export", "verify", "explain", "report"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if list(run_dir.glob(begun.get(stage, stage))) or (run_dir / stage / "result.json").exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        if not (run_dir / stage / "result.json").exists():
            killed.append(stage)
    assert {"train", "compress", "quantize", "verify"} <= set(killed)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "skipped, finished before: data, model, train, compress" in done.stderr
    assert "Test accuracy" in done.stdout
    expected, found = weights(undisturbed.run_dir), weights(run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_outcome(run_dir)["accuracy"] == undisturbed["accuracy"]


def test_changed_data_is_refused(tmp_path, monkeypatch):
    recipe = build_recipe(TINY | {"budget": ""})
    run_dir = tmp_path / "run"
    train_run(build_recipe(recipe.tables(), {"train.epochs": 1}), out=run_dir)
    result = json.loads((run_dir / "data" / "result.json").read_text())
    (run_dir / "data" / "result.json").write_text(json.dumps(result | {"fingerprint": "other"}))
    (run_dir / "verify" / "result.json").unlink()
    with pytest.raises(DataError, match="is not the data this run was begun with"):
        train_run(build_recipe(recipe.tables(), {"train.epochs": 1}), out=run_dir)


def test_a_budget_out_of_reach_is_refused_before_training(tmp_path):
    with pytest.raises(BudgetError, match="can go down to"):
        fit("digits", budget="macs<=0.01%", epochs=1, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "train").exists()


def test_train_runs_without_a_budget_and_can_be_loaded(tmp_path):
    result = train_run(build_recipe({"train": {"epochs": 1}, "run": {"device": "cpu"}}), out=tmp_path / "run")
    data = convette.load_data("digits")
    model = convette.load(result.files["model"])
    accuracy = convette.evaluate(model, data.test, data.preprocessing).accuracy
    assert accuracy == pytest.approx(result["accuracy"])
    with pytest.raises(UsageError, match="begun with"):
        fit(recipe=build_recipe({"train": {"epochs": 2}, "run": {"device": "cpu"}}), out=tmp_path / "run")
