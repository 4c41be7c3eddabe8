"""Choosing a precision: candidates are made, their accuracy and latency measured, and one is kept, with the reason."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convette._progress import progress
from convette.errors import BudgetError, ConvetteError, DataError
from convette.quantization._calibration import training_images
from convette.quantization._int8 import quantize_onnx, quantize_openvino
from convette.quantization._settings import QuantizeSettings
from convette.runtime import EngineSpec, Latency, Runner, export, exported_size, measure_latency, overlap, prepare
from convette.surgery import card_of

Evaluate = Callable[[Runner, Any, Any], Any]


@dataclass(frozen=True)
class Candidate:
    """A file in a precision on an engine, measured. `name` is the engine to run it on (`convette.runtime.prepare`).

    `accuracy` is on the validation split (0..1); `size` the file's bytes (weights included); `precision` what is really
    computed in.
    """

    name: str
    precision: str
    accuracy: float
    latency: Latency
    size: int
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self) | {"latency": self.latency.to_json(), "path": str(self.path)}


@dataclass(frozen=True)
class QuantizeResult:
    """Every candidate's figures, the name of the one kept, why (one sentence), and what could not be made."""

    candidates: tuple[Candidate, ...]
    kept: str
    reason: str
    failures: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The candidate that was kept."""
        return next(candidate for candidate in self.candidates if candidate.name == self.kept)

    @property
    def quantized(self) -> bool:
        """Whether an int8 candidate was kept."""
        return self.chosen.precision == "int8"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "kept": self.kept,
            "reason": self.reason,
            "failures": list(self.failures),
        }


def quantize(
    model: nn.Module,
    data: Any,
    settings: QuantizeSettings | None = None,
    *,
    out: Path | str,
    preprocessing: Any = None,
    evaluate: Evaluate | None = None,
    threads: int | None = None,
    max_size: int | None = None,
) -> QuantizeResult:
    """Make float and int8 files of `model`, measure accuracy and latency of each, keep the one that pays.

    Candidates: OpenVINO in float32, in what it prefers here (bfloat16 on many servers) and int8, ONNX Runtime in
    float32 and int8. Accuracy is taken on the validation split, latency interleaved in one run, both on the written
    files. int8 is kept only if its median is faster than every float candidate's, beyond the intervals of both, AND it
    loses at most ``settings.max_accuracy_drop`` against float32. On small or depthwise networks bfloat16 or float32
    often wins.

    Args:
        model: the network, left as it is.
        data: `convette.data.ImageData`: calibrated on its training split, judged on its validation split.
        settings: None: the defaults.
        out: folder for the files: ``model.xml/.bin``, ``model.onnx``, ``model.int8.xml/.bin``, ``model.int8.onnx``.
        preprocessing: None: the model card's, or the data's.
        evaluate: ``(runner, split, preprocessing) -> .accuracy``; None: `convette.training.evaluate_runner`.
        threads: CPU threads; None: those of torch.
        max_size: bytes the kept file may have at most.

    Raises `DataError` for calibration images no range can be learnt from, `BudgetError` if no file accurate enough fits
    `max_size`. An int8 file that cannot be made for another reason is left out and told in `failures`.
    """
    settings = settings or QuantizeSettings()
    preprocessing = preprocessing or _preprocessing(model, data)
    if evaluate is None:
        from convette.training import evaluate_runner as evaluate
    example = preprocessing(data.validation.images(slice(0, settings.batch_size)))
    files, failures = _write_files(model, data, preprocessing, example, settings, Path(out))
    candidates = _measure(files, data.validation, preprocessing, example, settings, evaluate, threads)
    kept, reason = choose(candidates, settings, max_size)
    return QuantizeResult(tuple(candidates), kept, reason, tuple(failures))


def choose(candidates: list[Candidate], settings: QuantizeSettings, max_size: int | None = None) -> tuple[str, str]:
    """Return the name of the candidate to keep and the reason, as `quantize` says."""
    reference = max(candidate.accuracy for candidate in candidates if candidate.precision == "fp32")
    rejected: list[str] = []

    def best(int8: bool) -> Candidate | None:
        fitting = []
        for candidate in sorted(candidates, key=lambda candidate: candidate.latency.p50):
            lost = reference - candidate.accuracy
            if (candidate.precision == "int8") != int8:
                continue
            if lost > settings.max_accuracy_drop + 1e-9:
                rejected.append(
                    f"{candidate.name} loses {100 * lost:.2f} points of accuracy, more than the "
                    f"{100 * settings.max_accuracy_drop:.2f} allowed"
                )
            elif max_size is not None and candidate.size > max_size:
                rejected.append(f"{candidate.name} has {candidate.size:,} bytes, more than the {max_size:,} allowed")
            else:
                fitting.append(candidate)
        return fitting[0] if fitting else None

    plain, int8 = best(False), best(True)
    told = f" ({'; '.join(rejected)})" if rejected else ""
    if plain is None and int8 is None:
        smallest = min(candidate.size for candidate in candidates)
        raise BudgetError(
            f"no file is accurate enough and small enough: {'; '.join(rejected)}; smallest: {smallest:,}."
        )
    if int8 is None:
        assert plain is not None
        why = told or (" (no int8 was made)" if not any(c.precision == "int8" for c in candidates) else "")
        return plain.name, f"{_figures(plain)} is kept: no int8 candidate qualifies{why}."
    if plain is None:
        return int8.name, f"{_figures(int8)} is kept: no float candidate fits{told}."
    if int8.latency.p50 < plain.latency.p50 and not overlap(int8.latency, plain.latency):
        return int8.name, f"{_figures(int8)} is kept: faster than {_figures(plain)} and accurate enough{told}."
    slower = "is no faster than" if overlap(int8.latency, plain.latency) else "is slower than"
    if settings.mode == "on":
        return int8.name, f"{_figures(int8)} is kept as asked, though it {slower} {_figures(plain)}{told}."
    return plain.name, f"{_figures(plain)} is kept: int8 {slower} it ({_figures(int8)}){told}."


def _figures(candidate: Candidate) -> str:
    precision = "" if candidate.name.endswith(candidate.precision) else f" in {candidate.precision}"
    return (
        f"{candidate.name}{precision} ({candidate.latency.p50:.3g} ms, {100 * candidate.accuracy:.2f} %, "
        f"{candidate.size:,} bytes)"
    )


def _write_files(
    model: nn.Module, data: Any, preprocessing: Any, example: Tensor, settings: QuantizeSettings, out: Path
) -> tuple[dict[str, Path], list[str]]:
    engines = {EngineSpec.parse(engine).engine for engine in settings.engines}
    files: dict[str, Path] = {}
    failures: list[str] = []
    observer = None if settings.observer == "default" else settings.observer
    calibration = (
        training_images(data, preprocessing, settings.calibration_images, settings.seed)
        if settings.mode != "off"
        else []
    )
    with progress("quantise", len(engines) * (1 if settings.mode == "off" else 2), "file") as advance:
        for engine, suffix in (("openvino", ".xml"), ("onnxruntime", ".onnx")):
            if engine not in engines:
                continue
            plain = export(model, example, out / f"model{suffix}")
            files[f"{engine}:cpu:fp32"] = plain
            advance(detail=plain.name)
            if settings.mode == "off":
                continue
            path = out / f"model.int8{suffix}"
            try:
                if engine == "openvino":
                    quantize_openvino(model, example, calibration, path, observer=observer)
                else:
                    quantize_onnx(plain, calibration, path, observer=observer)
                files[f"{engine}:cpu:int8"] = path
            except DataError:
                raise
            except ConvetteError as error:
                failures.append(str(error))
            advance(detail=path.name)
    return files, failures


def _measure(
    files: dict[str, Path],
    validation: Any,
    preprocessing: Any,
    example: Tensor,
    settings: QuantizeSettings,
    evaluate: Evaluate,
    threads: int | None,
) -> list[Candidate]:
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, path in files.items():
            runners[name] = stack.enter_context(prepare(name, path, example, threads=threads))
        if "openvino:cpu:fp32" in files:
            preferred = stack.enter_context(
                prepare("openvino:cpu", files["openvino:cpu:fp32"], example, threads=threads)
            )
            if preferred.precision != "fp32":
                runners["openvino:cpu"] = preferred
        latencies = measure_latency(runners, example, time_limit=settings.time_limit)
        found = []
        with progress("quantise: accuracy", len(runners), "candidate") as advance:
            for name, runner in runners.items():
                path = files.get(name, files.get(f"{name}:fp32", Path()))
                accuracy = float(evaluate(runner, validation, preprocessing).accuracy)
                found.append(Candidate(name, runner.precision, accuracy, latencies[name], exported_size(path), path))
                advance(detail=name)
    return found


def _preprocessing(model: nn.Module, data: Any) -> Any:
    card = card_of(model).preprocessing
    if not card:
        return data.preprocessing
    from convette.data import Preprocessing

    return Preprocessing.from_json(card)
