"""Stage verify: the exported files against the network, and the one look at the test split."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette._files import replacing
from convette._progress import note
from convette.cost import Cost, count
from convette.errors import ConvetteError
from convette.pipeline._latency import measure_both, samples_for
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.results import ExportedFile, ExportResult, FileCheck, VerifyResult, read_result
from convette.pipeline.stages.compress import limit_result
from convette.pipeline.stages.export import READERS
from convette.pipeline.stages.train import scores_of
from convette.runtime import EngineSpec, missing, prepare, verify
from convette.training import Evaluation, evaluate, evaluate_runner

MISTAKES = 24


def verify_run(run: Run, folder: Path) -> VerifyResult:
    """Check the files on real images; score the networks before and after on the test split; measure both."""
    before, after = run.network("train"), run.network(run.final_stage())
    exported: ExportResult | None = read_result(run.path, "export")
    files = exported.files if exported else []
    checks = [
        _check(run, after, file, engine)
        for file in files
        if file.format != "convette"
        for engine in _checking_engines(run, file)
    ]
    test_before, test_after = (
        evaluate(network, run.data.test, run.data.preprocessing, device=run.device) for network in (before, after)
    )
    _write_predictions(test_before, test_after, folder / "predictions.npz")
    _write_mistakes(run, test_after, folder / "mistakes.npz")
    engines = _engines(run) if files else ()
    load, samples = run.recipe.run.contention, samples_for(run.budget)
    latencies = measure_both(before, after, run.example, engines, _int8(run, files), load=load, samples=samples)
    cost_before, cost_after = (
        replace(count(network, run.example), latency=latencies[name])
        for name, network in (("before", before), ("after", after))
    )
    limits = _limits(run, cost_before, cost_after) if run.folder.finished("compress") else []
    return VerifyResult(
        files=checks,
        test_before=scores_of(test_before),
        test_after=scores_of(test_after),
        cost_before=cost_before.to_json(),
        cost_after=cost_after.to_json(),
        limits=limits,
        file_before=_file_bytes(run, "train") if files else None,
        file_after=_file_bytes(run, "export") if files else None,
    )


def _file_bytes(run: Run, stage: str) -> int:
    return (run.path / stage / MODEL_FILE).stat().st_size


def _checking_engines(run: Run, file: ExportedFile) -> list[str]:
    """Return the engines to check a file on: in its own precision, and as its reader runs it by itself."""
    reader = READERS[file.format]
    engines = [f"{reader}:{file.precision}"]
    if file.precision == "fp32":
        with prepare(reader, run.path / file.file, run.example) as runner:
            engines += [reader] if runner.precision != "fp32" else []
    return engines


def _check(run: Run, model: nn.Module, file: ExportedFile, engine: str) -> FileCheck:
    path = run.path / file.file
    check = verify(path, model, real_images(run, run.recipe.export.verify_images), engine=engine)
    with prepare(check.engine, path, run.example) as runner:
        scores = evaluate_runner(runner, run.data.test, run.data.preprocessing)
    if not check.passed:
        raise ConvetteError(
            f"{path}: gives other answers than the network it was made from on {check.engine} (largest difference "
            f"{check.max_abs_error:.3g}, same class on {check.agreement:.2%} of {check.images} images); do not use it. "
            "Please report this network; with quantize.mode = 'off' or other export.formats the run can end."
        )
    note(f"verify: {path} on {check.engine} agrees on {check.agreement:.2%} of {check.images} real images")
    return FileCheck(
        file=file.file,
        engine=check.engine,
        images=check.images,
        max_abs_error=check.max_abs_error,
        tolerance=check.tolerance,
        agreement=check.agreement,
        accuracy=scores.accuracy,
        passed=check.passed,
    )


def real_images(run: Run, wanted: int) -> Tensor:
    """Return up to `wanted` real images, ready for the network: of the test split, then validation, then training."""
    parts, left = [], wanted
    for split in (run.data.test, run.data.validation, run.data.train):
        if left > 0:
            parts.append(split.images(range(min(left, len(split)))))
            left -= len(parts[-1])
    return run.data.preprocessing(torch.cat(parts))


def _engines(run: Run) -> tuple[str, ...]:
    asked = run.budget.engines if run.budget else ()
    others = [engine for engine in run.recipe.run.engines if missing(engine) is None]
    return tuple(dict.fromkeys([*asked, *(str(EngineSpec.parse(engine)) for engine in others)]))


def _int8(run: Run, files: list[ExportedFile]) -> dict[str, Path]:
    return {READERS[file.format]: run.path / file.file for file in files if file.precision == "int8"}


def _limits(run: Run, before: Cost, after: Cost) -> list:
    assert run.budget is not None
    if run.few_bits and run.folder.finished("export"):
        # Then the limit is for all that lies on the disk.
        after = replace(after, size=_file_bytes(run, "export"))
    known = [limit for limit in run.budget.limits if limit.metric != "latency" or limit.engine in after.latency]
    budget = replace(run.budget, limits=tuple(known))
    return [limit_result(status) for status in budget.resolve(before).check(after)]


def _confidence(evaluation: Evaluation) -> np.ndarray:
    return evaluation.probabilities.max(1).values.numpy()


def _write_predictions(before: Evaluation, after: Evaluation, path: Path) -> None:
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            indices=np.arange(len(after.labels)),
            labels=after.labels.numpy(),
            before=before.predictions.numpy(),
            after=after.predictions.numpy(),
            confidence_before=_confidence(before),
            confidence_after=_confidence(after),
        )


def _write_mistakes(run: Run, after: Evaluation, path: Path) -> None:
    confidence = _confidence(after)
    wrong = np.nonzero((after.predictions != after.labels).numpy())[0]
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            images=run.data.test.images(worst.tolist()).numpy(),
            indices=worst,
            labels=after.labels.numpy()[worst],
            predictions=after.predictions.numpy()[worst],
            confidences=confidence[worst],
        )


STAGE = Stage("verify", verify_run)
