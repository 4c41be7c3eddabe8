"""`fit`: from data and a budget to a network that fits, in stages that a crash cannot undo."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convette._progress import note, set_quiet
from convette.cost import Budget
from convette.errors import InterruptedRun, UsageError
from convette.pipeline._run import Run, seed_everything
from convette.pipeline.recipe import Recipe, build_recipe, load_recipe
from convette.pipeline.results import RunRecord, Summary, read_result, read_run
from convette.pipeline.run_folder import RunFolder, now, open_run
from convette.pipeline.stages import FIT, STAGES, TRAIN
from convette.pipeline.summary import summarise, table
from convette.training import distributed, start_distributed


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    `summary` holds the rows of the before / after / budget table; `files` the paths of what it made: "model" (load it
    with `convette.load`), "onnx", "openvino", "recommended" (the one to deploy), "report", where they were asked for.
    """

    run_dir: Path
    summary: Summary
    files: Mapping[str, Path]

    @property
    def met(self) -> bool:
        """Whether every limit of the budget holds."""
        return self.summary.met

    def __getitem__(self, key: str) -> float:
        """Return a figure of the network that came out: "accuracy", "macs", "latency.p50@openvino:cpu" ..."""
        return next(row.after for row in self.summary.rows if row.key == key)

    def table(self) -> str:
        """Return the before / after / budget table as text."""
        return table(self.summary)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        files = {name: str(path) for name, path in self.files.items()}
        return {"run": str(self.run_dir), "files": files, **self.summary.model_dump(mode="json")}


def fit(
    data: str | None = None,
    *,
    budget: str | Budget | None = None,
    model: str | None = None,
    epochs: int | None = None,
    recipe: Recipe | Path | str | None = None,
    out: Path | str | None = None,
    seed: int | None = None,
    device: str | None = None,
    restart: bool = False,
) -> FitResult:
    """Train a network on `data` that fits `budget`; verify, explain, export and report it.

    Stages: data, model, train, compress, quantize, export, verify, explain, report. The same call again goes on where
    it was stopped; what is finished is skipped. On a CPU with one thread an interrupted run ends with the same weights,
    bit for bit, as an undisturbed one (budgets on latency aside: those are measured).

    Args:
        data: ``"digits"``, ``"folder:PATH"``, ``"parquet:PATH"``, ``"hub:NAME"``, ``"torchvision:NAME"``.
        budget: limits such as ``"macs<=40%, latency<=2ms@openvino:cpu"``; None: no compression.
        model: a name as `convette.create_model` takes it; None or ``"auto"``: chosen by the size of the images.
        epochs: of training; recovery after pruning takes as many more.
        recipe: everything else, as a `Recipe` or a TOML file; the arguments given here go over it.
        out: the run folder; None: one under ``runs/`` that is named by data and recipe.
        seed, device: of everything random; ``"auto"``, ``"cpu"``, ``"cuda"``.
        restart: throw away what an earlier run left in the folder.

    Raises `UsageError`, `DataError`, `BudgetError` (before training, with the smallest cost in reach), `StorageError`,
    `InterruptedRun`; all of them leave finished stages intact.
    """
    overrides = {
        "data.source": data,
        "budget.limits": str(budget) if budget is not None else None,
        "model.name": model,
        "train.epochs": epochs,
        "run.seed": seed,
        "run.device": device,
    }
    return run_recipe(as_recipe(recipe, overrides), FIT, out=out, restart=restart)


def as_recipe(recipe: Recipe | Path | str | None, overrides: Mapping[str, Any]) -> Recipe:
    """Return `recipe` (an object, a file or nothing) with those of the dotted `overrides` that are not None."""
    given = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(recipe, Recipe):
        return build_recipe(recipe.model_dump(mode="json", exclude_unset=True), given)
    return load_recipe(recipe, given) if recipe is not None else build_recipe({}, given)


def train_run(recipe: Recipe, *, out: Path | str | None = None, restart: bool = False) -> FitResult:
    """Train the network of `recipe` in a run folder and score it on the test split once, without compression."""
    return run_recipe(recipe, TRAIN, out=out, restart=restart)


def run_recipe(
    recipe: Recipe, stages: Sequence[str], *, out: Path | str | None = None, restart: bool = False
) -> FitResult:
    """Run `stages` of `recipe` in its run folder, skipping what is finished there; returns the outcome."""
    start_distributed(recipe.run.device)
    path = Path(out or recipe.run.out or default_folder(recipe, stages))
    if not distributed.is_main():
        set_quiet(True)
    with _stoppable(path), _opened(path, recipe, stages, restart) as folder:
        run = Run(recipe, folder)
        _say_skipped(folder)
        for name in stages:
            _run_stage(run, name)
        if distributed.is_main() and folder.record.summary is None:
            folder.conclude(summarise(path))
    distributed.barrier()
    return read_outcome(path)


def read_outcome(run_dir: Path | str) -> FitResult:
    """Return the outcome of a finished run. Raises `UsageError` if it has not finished."""
    run_dir = Path(run_dir)
    record: RunRecord = read_run(run_dir)
    if record.summary is None:
        raise UsageError(f"{run_dir}: this run has not finished; the command that began it goes on: {record.command}")
    files: dict[str, Path] = {}
    exported = read_result(run_dir, "export")
    for file in exported.files if exported else []:
        files["model" if file.format == "convette" else file.format] = run_dir / file.file
        if file.recommended:
            files["recommended"] = run_dir / file.file
    if not exported:
        stage = "compress" if read_result(run_dir, "compress") else "train"
        files["model"] = run_dir / stage / "model.safetensors"
    if (run_dir / "report.html").exists():
        files["report"] = run_dir / "report.html"
    return FitResult(run_dir, record.summary, files)


def describe(result: FitResult) -> str:
    """Return the end of a run as people read it: the table, what is worth knowing, how to use what came out."""
    lines = [result.table(), ""]
    if not result.met:
        lines.append("The budget is missed: see the rows marked MISSED.")
        if any(row.met is False and row.label.startswith("Latency") for row in result.summary.rows):
            lines.append(
                "Latency is measured anew at the end: where other work disturbs it, raise prune.latency_margin."
            )
        lines.append("")
    lines += result.summary.notes
    if result.summary.notes:
        lines.append("")
    return "\n".join([*lines, "Use it:", *(f"  {command}" for command in result.summary.use)])


def default_folder(recipe: Recipe, stages: Sequence[str]) -> Path:
    """Return ``runs/DATA-DIGEST``: the same recipe finds its folder again, another one never does."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.data.source.rstrip("/").rpartition("/")[2].lower()).strip("-")
    verb = "" if "export" in stages else "-train"
    return Path("runs") / f"{name or 'run'}{verb}-{recipe.digest()[:6]}"


def _run_stage(run: Run, name: str) -> None:
    stage, folder = STAGES[name], run.folder
    reason = stage.left_out(run.recipe)
    if reason is not None:
        if distributed.is_main():
            folder.leave_out(name, reason)
        return
    # The first rank knows; the others could look while it writes.
    if distributed.broadcast(folder.finished(name)):
        return
    if stage.on_all_ranks or distributed.is_main():
        started = time.monotonic()
        seed_everything(run.recipe.run.seed, name)
        target = folder.begin(name) if distributed.is_main() else run.path / name
        distributed.barrier() if stage.on_all_ranks else None
        result = stage.run(run, target)
        if distributed.is_main():
            seconds = round(time.monotonic() - started, 2)
            folder.finish(name, result.model_copy(update={"seconds": seconds, "finished_at": now()}))
    distributed.barrier()


def _say_skipped(folder: RunFolder) -> None:
    done = [name for name in folder.stages if folder.finished(name)]
    if done:
        todo = [name for name in folder.stages if name not in done and folder.record.stage(name).state != "left out"]
        rest = f"going on with {todo[0]}" if todo else "nothing is left to do"
        note(f"{folder.path}: skipped, finished before: {', '.join(done)}; {rest}")


@contextlib.contextmanager
def _opened(path: Path, recipe: Recipe, stages: Sequence[str], restart: bool) -> Iterator[RunFolder]:
    if distributed.is_main():
        with open_run(path, recipe, stages, restart=restart) as folder:
            distributed.barrier()
            yield folder
    else:
        distributed.barrier()
        yield RunFolder(path, stages, read_run(path))


@contextlib.contextmanager
def _stoppable(path: Path) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `InterruptedRun`, which says that the same command goes on."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, InterruptedRun) as error:
        raise InterruptedRun(f"{path}: stopped; the same command goes on from here.") from error
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
