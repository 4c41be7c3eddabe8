"""Stage export: the files that are deployed."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from convette import models
from convette._files import replacing
from convette._progress import note
from convette.cost import format_bytes
from convette.layers.quantization.deployed import quantized_layers
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.conversion import deployed
from convette.pipeline.results import ExportedFile, ExportResult, FileFormat, QuantizationResult, read_result
from convette.runtime import EngineSpec, export, exported_size, fastest, measure_latency, prepare

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
READERS = {"onnx": "onnxruntime:cpu", "openvino": "openvino:cpu"}


def export_network(run: Run, folder: Path) -> ExportResult:
    """Write the network as `.safetensors` and in the formats of the recipe, and the int8 file where one was kept."""
    model = run.network(run.final_stage())
    # The network's own file stays as it was trained, to go on from; the others are folded.
    models.save(model, folder / MODEL_FILE)
    model, kept = deployed(model, run.example)
    for line in unfolded_lines(kept):
        note(f"export: not folded, {line}")
    low_bit = bool(quantized_layers(model))
    files = [_described(run, folder / MODEL_FILE, "convette", "low-bit" if low_bit else "fp32")]
    for form in run.recipe.export.formats:
        path = export(model, run.example, folder / f"model{SUFFIXES[form]}", to=form)
        files.append(_described(run, path, form, "int8" if low_bit else "fp32"))
    quantized: QuantizationResult | None = read_result(run.path, "quantize")
    if quantized is not None and quantized.file is not None:
        source = run.path / "quantize" / quantized.file
        path = _copy(source, folder / f"model-int8{source.suffix}")
        files.append(_described(run, path, "onnx" if path.suffix == ".onnx" else "openvino", "int8"))
    measured = quantized if not low_bit else None
    place = None if run.named_engine is None else _of_engine(files, run.named_engine, measured)
    if place is not None:
        files = _marked(files, place)
    else:
        if run.named_engine is not None:
            note(f"export: the budget names {run.named_engine}, whose file export.formats leaves out")
        files = _recommend(files, measured) if measured is not None else _fastest(run, files)
    for file in files:
        note(f"export: {run.path / file.file} ({format_bytes(file.bytes)})")
    return ExportResult(files=files, unfolded=kept)


def unfolded_lines(kept: Mapping[str, str]) -> list[str]:
    """Return one line for each kind of layer that stays in the files, with the first reason of that kind.

    An un-tied network has dozens of gathers and scatters, each of which would say its own numbers.
    """
    kinds: dict[str, list[str]] = {}
    for name, reason in kept.items():
        kinds.setdefault(reason.partition(":")[0], []).append(name)
    lines = []
    for names in kinds.values():
        reasons = list(dict.fromkeys(kept[name] for name in names))
        others = f" and {len(names) - 1} more" if names[1:] else ""
        lines.append(f"{names[0]}{others}: {reasons[0]}{' The others alike.' if reasons[1:] else ''}")
    return lines


def _of_engine(files: list[ExportedFile], engine: EngineSpec, quantized: QuantizationResult | None) -> int | None:
    """Return which file `engine` runs: the int8 one where that was kept, convette's own where it reads no other."""
    form = {reader.partition(":")[0]: form for form, reader in READERS.items()}.get(engine.engine, "convette")
    int8 = quantized is not None and quantized.file is not None and engine.precision in (None, "int8")
    for precision in ("int8", None) if int8 else ("fp32", None):
        for place, file in enumerate(files):
            if file.format == form and precision in (None, file.precision):
                return place
    return None


def _recommend(files: list[ExportedFile], quantized: QuantizationResult) -> list[ExportedFile]:
    """Mark the file to deploy: the one the stage quantize measured and kept, else the last one."""
    form = "openvino" if quantized.kept.startswith("openvino") else "onnx"
    precision = "int8" if quantized.file else "fp32"
    matching = [i for i, file in enumerate(files) if (file.format, file.precision) == (form, precision)]
    return _marked(files, matching[0] if matching else len(files) - 1)


def _fastest(run: Run, files: list[ExportedFile]) -> list[ExportedFile]:
    """Mark the file to deploy where nothing was quantised: the one whose engine is the fastest here, by measuring."""
    places = {READERS[file.format]: i for i, file in enumerate(files) if file.format in READERS}
    if len(places) < 2:
        return _marked(files, len(files) - 1)
    with contextlib.ExitStack() as stack:
        runners = {
            engine: stack.enter_context(prepare(engine, run.path / files[i].file, run.example))
            for engine, i in places.items()
        }
        choice = fastest(measure_latency(runners, run.example, time_limit=2.0))
    note(f"export: {choice.reason}")
    return _marked(files, places[choice.name])


def _marked(files: list[ExportedFile], best: int) -> list[ExportedFile]:
    return [file.model_copy(update={"recommended": i == best}) for i, file in enumerate(files)]


def _described(run: Run, path: Path, form: FileFormat, precision: str) -> ExportedFile:
    size = path.stat().st_size if form == "convette" else exported_size(path)
    return ExportedFile(file=str(path.relative_to(run.path)), format=form, precision=precision, bytes=size)


def _copy(source: Path, target: Path) -> Path:
    pairs = [(source.with_suffix(".bin"), target.with_suffix(".bin"))] if source.suffix == ".xml" else []
    for old, new in [*pairs, (source, target)]:
        with replacing(new) as temporary:
            shutil.copyfile(old, temporary)
    return target


STAGE = Stage("export", export_network)
