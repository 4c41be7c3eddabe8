"""A run folder: one process at a time, results whole or not at all, another recipe refused."""

import errno
import json
import os

import pytest

from convette import _files
from convette.errors import StorageError, UsageError
from convette.pipeline import build_recipe, read_result, read_run
from convette.pipeline.fit import FitResult, describe
from convette.pipeline.results import ExportResult, ModelResult, ReportResult, Row, Summary
from convette.pipeline.run_folder import open_run

STAGES = ("model", "export", "report")
MODEL = ModelResult(name="resnet20", requested="auto", reason="small", cost={}, smallest=None, seconds=1.5)
EXPORT = ExportResult(files=[])


def test_results_are_there_whole_and_survive_reopening(tmp_path):
    with open_run(tmp_path / "run", build_recipe({}), STAGES) as folder:
        target = folder.begin("model")
        (target / "model.safetensors").write_bytes(b"x")
        assert not folder.finished("model")
        folder.finish("model", MODEL)
        folder.leave_out("export", "not wanted")
    with open_run(tmp_path / "run", build_recipe({}), STAGES) as folder:
        assert folder.finished("model") and read_result(folder.path, "model") == MODEL
        states = {stage.name: stage.state for stage in folder.record.stages}
        assert states == {"model": "finished", "export": "left out", "report": "to do"}
        assert folder.record.stage("model").seconds == 1.5


def test_the_recipe_of_the_folder_repeats_the_run(tmp_path):
    from convette.pipeline import load_recipe

    recipe = build_recipe({"train": {"epochs": 3, "ema_decay": None}})
    with open_run(tmp_path / "run", recipe, STAGES):
        pass
    assert load_recipe(tmp_path / "run" / "recipe.toml") == recipe


def test_a_second_user_is_refused_while_the_first_works(tmp_path):
    with (
        open_run(tmp_path, build_recipe({}), STAGES),
        pytest.raises(UsageError, match="another process is working"),
        open_run(tmp_path, build_recipe({}), STAGES),
    ):
        pass
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        assert folder.path == tmp_path


def test_another_recipe_is_refused_by_the_name_of_the_key(tmp_path):
    with open_run(tmp_path, build_recipe({}), STAGES):
        pass
    with (
        pytest.raises(UsageError, match=r"train\.epochs = 30, now it is 31.*--restart"),
        open_run(tmp_path, build_recipe({}, {"train.epochs": 31, "prune.epochs": 30}), STAGES),
    ):
        pass
    with open_run(tmp_path, build_recipe({}, {"run.out": "x"}), STAGES) as folder:
        folder.begin("model")
        folder.finish("model", MODEL)
    with open_run(tmp_path, build_recipe({}, {"train.epochs": 31}), STAGES, restart=True) as folder:
        assert not folder.finished("model") and not (tmp_path / "model").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with (
        pytest.raises(UsageError, match=r"photo\.jpg"),
        open_run(tmp_path, build_recipe({}), STAGES, restart=True),
    ):
        pass
    assert (tmp_path / "photo.jpg").exists()
    with pytest.raises(UsageError, match="is a file"), open_run(tmp_path / "photo.jpg", build_recipe({}), STAGES):
        pass


def test_leftovers_go_and_checkpoints_stay(tmp_path):
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        target = folder.begin("model")
        checkpoint = folder.checkpoints("model")
        checkpoint.mkdir()
        (checkpoint / "state").write_bytes(b"x")
        (target / "half.onnx").write_bytes(b"x")
        (target / ".result-abcd1234.json").write_bytes(b"x")
        (tmp_path / ".run-abcd1234.json").write_bytes(b"x")
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        assert not (tmp_path / ".run-abcd1234.json").exists()
        assert {item.name for item in folder.begin("model").iterdir()} == {"checkpoint"}
        folder.finish("model", MODEL)
        assert not folder.checkpoints("model").exists()


def test_a_crash_between_result_and_record_loses_nothing(tmp_path):
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        folder.begin("model")
        before = (tmp_path / "run.json").read_bytes()
        folder.finish("model", MODEL)
    (tmp_path / "run.json").write_bytes(before)
    (tmp_path / "model" / "checkpoint").mkdir()
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        assert folder.record.stage("model").state == "finished"
        assert not folder.checkpoints("model").exists()
    assert read_run(tmp_path).stage("model").seconds == 1.5


def test_what_was_made_from_a_lost_result_is_made_again(tmp_path):
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        for name, result in (("model", MODEL), ("export", EXPORT), ("report", ReportResult())):
            folder.begin(name)
            folder.finish(name, result)
    (tmp_path / "export" / "result.json").unlink()
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        assert [folder.finished(name) for name in STAGES] == [True, False, False]


def test_a_full_disk_leaves_the_earlier_state(tmp_path, monkeypatch):
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        folder.begin("model")
        folder.finish("model", MODEL)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        folder.begin("export")

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(_files.os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            folder.finish("export", EXPORT)
        monkeypatch.undo()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    with open_run(tmp_path, build_recipe({}), STAGES) as folder:
        assert folder.finished("model") and not folder.finished("export")


def test_a_damaged_record_is_refused_with_a_remedy(tmp_path):
    with open_run(tmp_path, build_recipe({}), STAGES):
        pass
    record = json.loads((tmp_path / "run.json").read_text())
    del record["created"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"created.*--restart"), open_run(tmp_path, build_recipe({}), STAGES):
        pass


@pytest.mark.parametrize(("key", "says"), [("latency.p50@openvino:cpu", True), ("macs", False)])
def test_a_latency_that_is_missed_says_what_can_be_done(tmp_path, key, says):
    label = "Latency p50, openvino:cpu" if says else "MACs"
    rows = [Row(key=key, label=label, unit="ms" if says else "count", before=3, after=2, budget=1, met=False)]
    told = describe(FitResult(tmp_path, Summary(rows=rows, met=False), {}))
    assert "The budget is missed" in told and ("prune.latency_margin" in told) == says
