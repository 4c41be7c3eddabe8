"""One file holds a network: safetensors whose metadata says where it came from and what was done to it.

The header is JSON; under ``__metadata__`` the key ``convette`` holds origin, edits, card and the names of tensors that
share memory. Nothing in a file is executed: the origin is handed to a builder of the caller's choice, the edits are
checked data, and the tensors are numbers. Any safetensors reader can open the file. Networks in few bits are written
with that JSON compressed, all tensors as one (`convette.surgery._compact`) and successive cuts as one edit, which takes
a tenth of the room; the history in the card still has every step.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette._files import replacing
from convette.errors import ConvetteError, FileFormatError, StructureError, UsageError
from convette.surgery import _compact
from convette.surgery._apply import replay
from convette.surgery._edits import Edit
from convette.surgery._edits_json import edit_from_json
from convette.surgery._log import ModelCard, Origin, card_of, set_card, set_origin, structure_log
from convette.surgery._merging import merged

FORMAT = 1
MAX_HEADER_BYTES = 64 << 20
_MAX_EDITS = 100_000


@dataclass(frozen=True)
class Header:
    """What a model file says before its tensors: origin, edits, card, and each tensor's dtype and shape.

    `joined`: whether the tensors lie in the file as one.
    """

    origin: Origin
    edits: tuple[Edit, ...]
    card: ModelCard
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    size_bytes: int
    shared: Mapping[str, str]
    joined: bool = False


def save_model(model: nn.Module, path: Path | str) -> None:
    """Write `model` to `path`, whole or not at all: origin, edits, card, parameters and buffers.

    Raises `UsageError` where the model's origin is unknown (`set_origin`), `StorageError` where writing fails.
    """
    import safetensors.torch

    tensors, text = _contents(model)
    if len(text) > MAX_HEADER_BYTES // 2:
        raise UsageError(f"{path}: the record of edits is too long to be read again ({len(text) >> 20} MiB).")
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"convette": text})


def file_size(model: nn.Module) -> int:
    """Return the bytes of the file that `save_model` would write, header and all; raises as it does."""
    import safetensors.torch

    tensors, text = _contents(model)
    return len(safetensors.torch.save(tensors, metadata={"convette": text}))


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the tensors to write, and the record."""
    log = structure_log(model)
    if log.origin is None:
        raise UsageError(
            f"this {type(model).__name__} cannot be saved: nothing says how to build it again. Create it with "
            "convette.create_model, or name its constructor with convette.surgery.set_origin(model, Origin(...))."
        )
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[int, int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        # A copy where the memory is not its own: views of one storage cannot be written as they are.
        tensors[name] = tensor.detach().cpu().contiguous()
    packed = _compact.is_packed(tensors)
    # Tensors with several names: two cuts may call one of them differently.
    edits = merged(log.edits) if packed and not shared else log.edits
    content = {
        "format": FORMAT,
        "origin": log.origin.to_json(),
        "edits": [edit.to_json() for edit in edits],
        "card": card_of(model).to_json(),
        "shared": shared,
    }
    if not packed:
        return _owned(tensors), _written(content)
    blob, table = _compact.joined(tensors)
    return {_compact.BLOB: blob}, _compact.compressed(_written(content | {"tensors": table}))


def _written(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen or _is_part(tensor) else tensor
        seen.add(pointer)
    return result


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def read_header(path: Path | str) -> Header:
    """Read what `path` says of its network without reading a tensor.

    Raises `FileFormatError` where the file is no safetensors file, damaged, or not one of ours, `UsageError` where
    there is none.
    """
    path = Path(path)
    header, size = _raw_header(path)
    metadata = header.pop("__metadata__", None)
    text = metadata.get("convette") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FileFormatError(
            f"{path}: a safetensors file, but not a convette model: it does not say how to build the network. "
            "Weights alone can be loaded into a model you name, with load_weights."
        )
    try:
        content = _json(path, _compact.plain(text, MAX_HEADER_BYTES))
        if not isinstance(content, dict):
            raise FileFormatError("its record is not an object.")
        if content.get("format") != FORMAT:
            raise FileFormatError(f"written in format {content.get('format')!r}; this version reads format {FORMAT}.")
        edits = content.get("edits", [])
        if not isinstance(edits, list) or len(edits) > _MAX_EDITS:
            raise FileFormatError("its edits must be a list.")
        shared = content.get("shared", {})
        if not isinstance(shared, dict) or not all(isinstance(value, str) for value in shared.values()):
            raise FileFormatError("'shared' must map names to names.")
        table = _tensor_table(header)
        if "tensors" in content:
            table = _compact.table_of(content["tensors"], _blob_size(table))
        return Header(
            Origin.from_json(content.get("origin")),
            tuple(edit_from_json(edit) for edit in edits),
            ModelCard.from_json(content.get("card", {})),
            table,
            size,
            shared,
            "tensors" in content,
        )
    except FileFormatError as error:
        message = str(error)
        raise FileFormatError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise FileFormatError(f"{path}: not a safetensors file (only {len(start)} bytes long).")
            length = struct.unpack("<Q", start)[0]
            if length > MAX_HEADER_BYTES and (start[:2] == b"PK" or start[:1] == b"\x80"):
                raise FileFormatError(
                    f"{path}: looks like a pickle or .pt file, not safetensors; it was not opened further."
                )
            if length > MAX_HEADER_BYTES:
                raise FileFormatError(
                    f"{path}: not a safetensors file, or tampered with: its header claims {length} bytes, more than "
                    f"the {MAX_HEADER_BYTES >> 20} MiB any model needs."
                )
            if length > size - 8:
                raise FileFormatError(f"{path}: cut short: its header needs {length} bytes, the file has {size - 8}.")
            raw = file.read(length)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: not a safetensors file (its header is no text).") from error
    header = _json(path, text)
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: not a safetensors file (its header is no object).")
    return header, size


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its header is not valid JSON ({type(error).__name__}).") from error


def _tensor_table(header: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    result = {}
    for name, entry in header.items():
        try:
            shape = tuple(int(size) for size in entry["shape"])
            result[name] = (str(entry["dtype"]), shape)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"its entry for tensor {name!r} is malformed.") from error
    return result


def _blob_size(table: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    kind, shape = table.get(_compact.BLOB, ("", ()))
    if len(table) != 1 or kind != "U8" or len(shape) != 1:
        raise FileFormatError("its tensors are said to lie in one, which is not there.")
    return shape[0]


def load_model(path: Path | str, build: Callable[[Origin], nn.Module]) -> nn.Module:
    """Read the network in `path`: `build` makes it from its origin, the edits are replayed, the tensors loaded.

    Returns the model in eval mode with log and card attached; its outputs equal those of the saved one bit for bit.
    `build` decides which constructors a file may name. Raises `FileFormatError` with the reason where anything in the
    file does not fit: an edit out of range, a missing, surplus or misshapen tensor, a damaged header.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    path = Path(path)
    header = read_header(path)
    model = build(header.origin)
    set_origin(model, header.origin)
    try:
        replay(model, header.edits)
    except StructureError as error:
        raise FileFormatError(f"{path}: its edits do not fit {header.origin.constructor}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_tensors(path, header, expected)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: damaged: {error}.") from error
    if header.joined:
        tensors = _compact.separated(tensors[_compact.BLOB], header.tensors)
    for name, other in header.shared.items():
        tensors[name] = tensors[other]
    _load(path, model, tensors)
    set_card(model, header.card)
    return model.eval()


def _check_tensors(path: Path, header: Header, expected: Mapping[str, tuple[int, ...]]) -> None:
    given = {name: shape for name, (_, shape) in header.tensors.items()}
    for name, other in header.shared.items():
        if other not in given or name in header.tensors:
            raise FileFormatError(f"{path}: tensor {name!r} is said to be {other!r}, which is not there.")
        given[name] = given[other]
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    if missing or surplus:
        kind, names = ("lacks", missing) if missing else ("has more tensors than", surplus)
        raise FileFormatError(
            f"{path}: {kind} what {header.origin.constructor} with its {len(header.edits)} edits needs: "
            f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}."
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise FileFormatError(f"{path}: tensor {name!r} has shape {given[name]}; the network needs {shape}.")


def _load(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    try:
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].dtype != tensor.dtype and own[name].is_floating_point() != tensor.is_floating_point():
                    raise FileFormatError(f"{path}: tensor {name!r} holds {tensor.dtype}, not {own[name].dtype}.")
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(kinds) == 1:
            model.to(kinds.pop())
        # Over the model's own state, which says in which version of its class it is.
        own = model.state_dict()
        own.update(tensors)
        model.load_state_dict(own, strict=True)
    except ConvetteError:
        raise
    except RuntimeError as error:
        raise FileFormatError(f"{path}: {str(error).splitlines()[0]}") from error
