"""Checkpoints: one safetensors file each, tensors plus a JSON tree; nothing in it can run code."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from convette._files import replacing, storage_errors
from convette._progress import note
from convette.errors import FileFormatError

_KEY = "convette_checkpoint"
_TENSOR = "$tensor"
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


def encode(tree: Any) -> bytes:
    """Return `tree` (dicts with string keys, lists, tensors, JSON values) as the bytes of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            held = value.detach().cpu().contiguous()
            if held.untyped_storage().data_ptr() in storages:
                held = held.clone()
            storages.add(held.untyped_storage().data_ptr())
            tensors[path] = held
            return {_TENSOR: path}
        if isinstance(value, Mapping):
            return {key: strip(inner, f"{path}/{key}" if path else str(key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [strip(inner, f"{path}/{index}") for index, inner in enumerate(value)]
        return value

    tree = strip(tree, "")
    return safetensors.torch.save(tensors, {_KEY: json.dumps(tree)})


def decode(content: bytes, where: str) -> Any:
    """Return the tree `encode` made; `where` names the file in errors. Raises `FileFormatError` if it is damaged."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        if length > len(content) - 8:
            raise ValueError("the file is cut short")
        tree = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
        tensors = safetensors.torch.load(content)

        def fill(value: Any) -> Any:
            if isinstance(value, dict):
                return tensors[value[_TENSOR]] if _TENSOR in value else {key: fill(v) for key, v in value.items()}
            return [fill(v) for v in value] if isinstance(value, list) else value

        return fill(tree)
    except (ValueError, KeyError, TypeError, struct.error, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{where}: not a whole checkpoint ({error}); delete it and run again.") from error


class CheckpointFolder:
    """A folder that keeps the last few checkpoints of one run. Only rank 0 should write."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name))

    def write(self, step: int, tree: Any) -> Path:
        """Write `tree` as the checkpoint of `step`, then drop the oldest ones beyond `keep`.

        Raises `StorageError` (disk full, no permission) with every earlier checkpoint intact.
        """
        path = self.folder / f"checkpoint-{step:09d}.safetensors"
        content = encode(tree)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        for old in self.paths()[: -self.keep]:
            with storage_errors(old):
                old.unlink(missing_ok=True)
        return path

    def read_latest(self) -> tuple[Path, Any] | None:
        """Return the newest whole checkpoint and its path; None where there is none.

        A damaged one is reported and passed over for the one before it. Raises `FileFormatError` when all are.
        """
        for leftover in self.folder.glob(".checkpoint-*"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while writing
        failure: FileFormatError | None = None
        for path in reversed(self.paths()):
            try:
                return path, decode(path.read_bytes(), str(path))
            except FileFormatError as error:
                note(f"{error} Trying the one before it.")
                failure = failure or error
        if failure is not None:
            raise failure
        return None


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random number generators of this process: Python, NumPy, torch, CUDA."""
    import random

    import numpy

    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    import random

    import numpy

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
