"""Stage export: the files that are deployed."""

import shutil
from pathlib import Path

from convette import models
from convette._files import replacing
from convette._progress import note
from convette.cost import format_bytes
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.results import ExportedFile, ExportResult, FileFormat, QuantizationResult, read_result
from convette.runtime import export, exported_size

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def export_network(run: Run, folder: Path) -> ExportResult:
    """Write the network as `.safetensors` and in the formats of the recipe, and the int8 file where one was kept."""
    model = run.network(run.final_stage())
    models.save(model, folder / MODEL_FILE)
    files = [_described(run, folder / MODEL_FILE, "convette", "fp32")]
    for form in run.recipe.export.formats:
        path = export(model, run.example, folder / f"model{SUFFIXES[form]}", to=form)
        files.append(_described(run, path, form, "fp32"))
    quantized: QuantizationResult | None = read_result(run.path, "quantize")
    if quantized is not None and quantized.file is not None:
        source = run.path / "quantize" / quantized.file
        path = _copy(source, folder / f"model-int8{source.suffix}")
        files.append(_described(run, path, "onnx" if path.suffix == ".onnx" else "openvino", "int8"))
    files = _recommend(files, quantized)
    for file in files:
        note(f"export: {run.path / file.file} ({format_bytes(file.bytes)})")
    return ExportResult(files=files)


def _recommend(files: list[ExportedFile], quantized: QuantizationResult | None) -> list[ExportedFile]:
    """Mark the file to deploy: what the stage quantize kept, else the last one."""
    best = len(files) - 1
    if quantized is not None:
        form = "openvino" if quantized.kept.startswith("openvino") else "onnx"
        precision = "int8" if quantized.file else "fp32"
        matching = [i for i, file in enumerate(files) if (file.format, file.precision) == (form, precision)]
        best = matching[0] if matching else best
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
