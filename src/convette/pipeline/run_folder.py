"""The folder a run lives in: locked while it is worked on, each stage's result there whole or not at all."""

import contextlib
import datetime
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convette import _files, _provenance
from convette._progress import note
from convette.errors import UsageError
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import (
    RESULT_FILE,
    RUN_FILE,
    RunRecord,
    StageResult,
    StageState,
    Summary,
    read_result,
    read_run,
)

CHECKPOINTS = "checkpoint"
LOGS = "log"
LOCK_FILE = "run.lock"
RECIPE_FILE = "recipe.toml"
# What `_files.replacing` calls a file that is still being written.
_LEFTOVER = re.compile(r"^\..+-[a-z0-9_]{8}(\.[A-Za-z0-9]+)?$")
# Keys that may differ between two sittings of one run: they change where it is written, not what comes out.
_FREE_KEYS = {("run", "out")}


class RunFolder:
    """A run on disk. Get one from `open_run`; `stages` are the names of all its stages, in order."""

    def __init__(self, path: Path, stages: Sequence[str], record: RunRecord) -> None:
        self.path = path
        self.stages = tuple(stages)
        self.record = record

    def finished(self, stage: str) -> bool:
        """Whether `stage` has left its result."""
        return (self.path / stage / RESULT_FILE).exists()

    def checkpoints(self, stage: str) -> Path:
        """Return the folder in which `stage` keeps what it needs to go on after a crash."""
        return self.path / stage / CHECKPOINTS

    def logs(self, stage: str) -> Path:
        """Return the folder for the logs of `stage`: one row an epoch, kept from sitting to sitting."""
        return self.path / stage / LOGS

    def begin(self, stage: str) -> Path:
        """Return the empty folder for the results of `stage`; checkpoints and logs of an earlier sitting are kept."""
        folder = self.path / stage
        with _files.storage_errors(folder):
            folder.mkdir(exist_ok=True)
            for item in folder.iterdir():
                if item.name not in (CHECKPOINTS, LOGS):
                    _remove(item)
        return folder

    def finish(self, stage: str, result: StageResult) -> None:
        """Write the result of `stage`: from here on it is finished. Then its checkpoints go."""
        _files.write_json(self.path / stage / RESULT_FILE, result.model_dump(mode="json"))
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)
        self._set(_finished(stage, result))

    def leave_out(self, stage: str, reason: str) -> None:
        """Note that `stage` does not apply to this run, and why."""
        self._set(StageState(name=stage, state="left out", note=reason))

    def conclude(self, summary: Summary) -> None:
        """Write the outcome: the run is finished."""
        self._write(state="finished", summary=summary)

    def _set(self, stage: StageState) -> None:
        stages = {one.name: one for one in self.record.stages} | {stage.name: stage}
        self._write(stages=[stages.get(name, StageState(name=name, state="to do")) for name in self.stages])

    def _write(self, **changes: Any) -> None:
        record = self.record.model_copy(update={**changes, "updated": now()})
        _files.write_json(self.path / RUN_FILE, record.model_dump(mode="json"))
        self.record = record


@contextlib.contextmanager
def open_run(path: Path | str, recipe: Recipe, stages: Sequence[str], *, restart: bool = False) -> Iterator[RunFolder]:
    """Lock the run folder `path` (made if it is not there) and bring it into order; what was finished stays finished.

    `restart` throws away what an earlier run left there. Raises `UsageError` when another process works in it, when
    it holds something else than a run, or a run of another recipe (the error names the key).
    """
    path = Path(path)
    _refuse_foreign(path)
    with _files.storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if restart:
            for item in path.iterdir():
                if item.name != LOCK_FILE:
                    _remove(item)
        if (path / RUN_FILE).exists():
            record = read_run(path)
            _refuse_another_recipe(path, record, recipe)
        else:
            record = _new_record(path, recipe, stages)
            recipe.save(path / RECIPE_FILE)
            _files.write_json(path / RUN_FILE, record.model_dump(mode="json"))
        folder = RunFolder(path, stages, record)
        _tidy(folder)
        yield folder


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine_facts() -> dict[str, Any]:
    """Return what the report says about this machine."""
    import psutil
    import torch

    return {
        "cpu": _provenance.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": _provenance.machine().rsplit(", ", 1)[-1],
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_FILE)
    with _files.storage_errors(path / LOCK_FILE):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{path}: another process is working on this run. Wait until it ends, or give another --out."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file; --out of a run is a folder.")
    if path.is_dir() and not (path / RUN_FILE).exists():
        other = [item.name for item in path.iterdir() if item.name not in (LOCK_FILE, RECIPE_FILE)]
        other = [name for name in other if not _LEFTOVER.match(name)]
        if other:
            raise UsageError(f"{path}: holds {sorted(other)[0]!r} and no run; give a new or empty folder as --out.")


def _refuse_another_recipe(path: Path, record: RunRecord, recipe: Recipe) -> None:
    for key, old, new in differences(record.recipe, recipe.tables()):
        raise UsageError(
            f"{path}: was begun with {key} = {old!r}, now it is {new!r}. Use another --out, or --restart to begin anew."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the keys ("section.key") whose values differ in a way that matters, with both values."""
    found = []
    for section in sorted({*old, *new}):
        before, after = old.get(section, {}), new.get(section, {})
        for key in sorted({*before, *after}):
            if (section, key) not in _FREE_KEYS and before.get(key) != after.get(key):
                found.append((f"{section}.{key}", before.get(key), after.get(key)))
    return found


def _new_record(path: Path, recipe: Recipe, stages: Sequence[str]) -> RunRecord:
    verb = "fit" if "export" in stages else "train"
    return RunRecord(
        name=path.name,
        command=_provenance.command(),
        reproduce=f"convette {verb} --recipe {path / RECIPE_FILE} --out {path}-again",
        created=now(),
        updated=now(),
        recipe=recipe.tables(),
        machine=machine_facts(),
        versions=_provenance.package_versions(),
        stages=[StageState(name=name, state="to do") for name in stages],
    )


def _tidy(folder: RunFolder) -> None:
    for place in (folder.path, *(folder.path / stage for stage in folder.stages)):
        for item in place.iterdir() if place.is_dir() else ():
            if item.is_file() and _LEFTOVER.match(item.name):
                item.unlink(missing_ok=True)
    whole = True
    for stage in folder.stages:
        state = folder.record.stage(stage)
        if state.state == "left out":
            continue
        if not folder.finished(stage):
            whole = False
        elif not whole:
            # Made from results that are gone.
            note(f"{folder.path / stage}: made from something that is missing now; it is made again.")
            _remove(folder.path / stage)
        else:
            shutil.rmtree(folder.checkpoints(stage), ignore_errors=True)
            if state.state != "finished":
                # The process ended between the result and this record of it.
                result = read_result(folder.path, stage)
                folder._set(_finished(stage, result))
    if not whole and folder.record.state == "finished":
        folder._write(state="running", summary=None)


def _finished(stage: str, result: StageResult) -> StageState:
    return StageState(name=stage, state="finished", seconds=result.seconds, finished_at=result.finished_at)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink(missing_ok=True)
