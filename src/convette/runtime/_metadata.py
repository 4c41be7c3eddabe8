"""What an exported file says about itself: one JSON object, the same for every format."""

import json
from importlib import metadata
from typing import Any

from torch import nn

from convette.errors import FileFormatError
from convette.surgery import card_of

KEY = "convette"  # the key of the JSON text in ONNX `metadata_props` and OpenVINO `rt_info`


def describe(model: nn.Module, *, precision: str, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the metadata of a file exported from `model`; `input_shape` is that of one image."""
    card = card_of(model)
    return {
        "convette": metadata.version("convette"),
        "task": card.task,
        "class_names": list(card.class_names),
        "preprocessing": card.preprocessing,
        "history": list(card.history),
        "precision": precision,
        "input_shape": list(input_shape),
    }


def dumps(value: dict[str, Any]) -> str:
    """Return `value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True)


def loads(text: str | None, where: str) -> dict[str, Any]:
    """Read the JSON of an exported file; an empty dict if it has none. Raises `FileFormatError` if damaged."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FileFormatError(f"{where}: the metadata key {KEY!r} holds no JSON ({error}). Export it again.") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: the metadata key {KEY!r} holds no JSON object. Export it again.")
    return value
