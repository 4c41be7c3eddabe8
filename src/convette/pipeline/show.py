"""What is in a file or a run folder, in words and as JSON."""

import json
from pathlib import Path
from typing import Any

from convette import surgery
from convette.cost import format_bytes, format_count
from convette.errors import UsageError
from convette.pipeline.fit import describe, read_outcome
from convette.pipeline.results import RUN_FILE, read_run
from convette.runtime import exported_size, read_export_metadata


def describe_path(path: Path | str) -> tuple[dict[str, Any], str]:
    """Return what is in a network file (`.safetensors`, `.onnx`, `.xml`) or run folder, as JSON values and as text.

    Nothing is built or run: only headers are read. Raises `UsageError` or `FileFormatError` for anything else.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder.")
    if path.is_dir():
        return _run(path)
    if path.suffix == ".safetensors":
        return _network(path)
    if path.suffix in (".onnx", ".xml"):
        metadata = read_export_metadata(path)
        value = {"file": str(path), "bytes": exported_size(path), **metadata}
        return value, f"{path}: {format_bytes(exported_size(path))}\n{_lines(metadata)}"
    raise UsageError(f"{path}: show reads .safetensors, .onnx and .xml files and run folders.")


def _network(path: Path) -> tuple[dict[str, Any], str]:
    header = surgery.read_header(path)
    parameters = sum(_elements(shape) for _, shape in header.tensors.values())
    edits = [edit.to_json() for edit in header.edits]
    value = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "origin": {"constructor": header.origin.constructor, "arguments": dict(header.origin.arguments)},
        "edits": edits,
        "card": {
            "task": header.card.task,
            "class_names": list(header.card.class_names),
            "preprocessing": dict(header.card.preprocessing),
            "history": [dict(step) for step in header.card.history],
        },
        "tensors": {
            name: {"dtype": str(dtype), "shape": list(shape)} for name, (dtype, shape) in header.tensors.items()
        },
    }
    arguments = ", ".join(f"{key}={item!r}" for key, item in header.origin.arguments.items())
    size = format_bytes(path.stat().st_size)
    lines = [
        f"{path}: {size}, {len(header.tensors)} tensors, {format_count(parameters)} values",
        f"origin   {header.origin.constructor}({arguments})",
        f"task     {header.card.task}: {len(header.card.class_names)} classes ({_shortened(header.card.class_names)})",
    ]
    if header.card.preprocessing:
        lines.append("input    " + ", ".join(f"{key} {item}" for key, item in header.card.preprocessing.items()))
    lines += [f"history  {number}. {_step(step)}" for number, step in enumerate(header.card.history, start=1)]
    lines += [f"edit     {number}. {_edit(edit, header)}" for number, edit in enumerate(header.edits, start=1)]
    if not edits:
        lines.append("edit     none: the network is as its constructor makes it")
    return value, "\n".join(lines)


def _run(path: Path) -> tuple[dict[str, Any], str]:
    if not (path / RUN_FILE).exists():
        raise UsageError(f"{path}: holds no run ({RUN_FILE} is missing).")
    record = read_run(path)
    lines = [f"{path}: {record.state}, begun {record.created} by: {record.command}"]
    for stage in record.stages:
        took = f"{stage.seconds:.1f} s" if stage.state == "finished" else stage.note
        lines.append(f"  {stage.name:<9} {stage.state:<9} {took}".rstrip())
    if record.summary is not None:
        lines += ["", describe(read_outcome(path))]
    return record.model_dump(mode="json"), "\n".join(lines)


def _step(step: Any) -> str:
    figures = {key: value for key, value in step.items() if key != "step" and isinstance(value, int | float | str)}
    words = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )
    return f"{step.get('step', '?')}: {words}"


def _edit(edit: surgery.Edit, header: surgery.Header) -> str:
    if isinstance(edit, surgery.Shrink):
        # Output channels of the layers; what follows from them (norms, inputs of the next layer) would only repeat it.
        layers = {
            name.removesuffix(".weight"): len(kept)
            for (name, dim), kept in edit.kept.items()
            if dim == 0 and name in header.tensors and len(header.tensors[name][1]) > 1
        }
        return "shrink to " + _shortened([f"{name} {width}" for name, width in layers.items()], 24)
    text = json.dumps(edit.to_json())
    return text if len(text) <= 160 else text[:157] + "..."


def _lines(value: dict[str, Any]) -> str:
    return "\n".join(
        f"{key:<14} {_shortened(item) if isinstance(item, list | tuple) else item}" for key, item in value.items()
    )


def _shortened(items: Any, most: int = 12) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f", ... {len(items) - most} more" if len(items) > most else "")


def _elements(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
