"""Small files for networks in few bits: one tensor of bytes, and a compressed record that says what lies where in it.

A header of JSON, names and shapes in full, is some twenty KB for a ResNet-20: as much as its weights in four bits.
"""

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convette.errors import FileFormatError

BLOB = "tensors"
_MARK = "zlib:"
# As safetensors calls them.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: kind for kind, name in _NAMES.items()}

Table = Mapping[str, tuple[str, tuple[int, ...]]]


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a network in few bits, which is written to be small."""
    kinds = {tensor.dtype for tensor in tensors.values()}
    return torch.uint8 in kinds and kinds <= _NAMES.keys()


def joined(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[list[Any]]]:
    """Return all values as one tensor of bytes, and ``[name, dtype, shape]`` of each in their order there."""
    # Wide values first, so that each lies at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    raw = [tensors[name].contiguous().flatten().view(torch.uint8) for name in order]
    table = [[name, _NAMES[tensors[name].dtype], list(tensors[name].shape)] for name in order]
    return torch.cat(raw), table


def table_of(value: Any, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a table as `joined` made it. Raises `FileFormatError` where it is malformed or not of `size` bytes."""
    table = {}
    try:
        for name, kind, shape in value:
            if not isinstance(name, str) or name in table or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError
            table[name] = (str(kind), tuple(shape))
        total = sum(_bytes(kind, shape) for kind, shape in table.values())
    except (TypeError, ValueError, KeyError) as error:
        raise FileFormatError("its table of tensors is malformed.") from error
    if total != size:
        raise FileFormatError(f"its table of tensors is for {total} bytes, the file has {size}.")
    return table


def separated(blob: Tensor, table: Table) -> dict[str, Tensor]:
    """Return the tensors that `joined` made one of."""
    found, start = {}, 0
    for name, (kind, shape) in table.items():
        end = start + _bytes(kind, shape)
        found[name] = blob[start:end].clone().view(_TYPES[kind]).reshape(shape)
        start = end
    return found


def compressed(text: str) -> str:
    """Return JSON as text that takes less room in a header."""
    return _MARK + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def plain(text: str, most: int) -> str:
    """Return the JSON of a header, compressed or not; of `most` bytes at the most. Raises `FileFormatError`."""
    if not text.startswith(_MARK):
        return text
    try:
        unpacking = zlib.decompressobj()
        found = unpacking.decompress(base64.b85decode(text.removeprefix(_MARK)), most)
        if not unpacking.eof:
            raise FileFormatError(f"its record is cut short, or longer than the {most >> 20} MiB any model needs.")
        return found.decode()
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"its record is damaged ({error}).") from error


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _TYPES[kind].itemsize
