"""Layers by name: ``"module:Class"`` with JSON arguments, from the few libraries a file may name."""

import inspect
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from convette._symbols import load_symbol
from convette.errors import FileFormatError, StructureError

_LIBRARIES = (
    "convette.layers",
    "convette.models",
    "convette.surgery",
    "torch.nn",
    "timm.layers",
    "timm.models",
    "torchvision.ops",
    "torchvision.models",
)
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MOST_ELEMENTS = 1 << 31
_LARGEST = 1 << 32
_DEPTH = 4
# Other names one layer has for the same argument as another.
_SYNONYMS = (
    ("in_channels", "in_features", "in_chs", "in_planes"),
    ("out_channels", "out_features", "out_chs", "out_planes"),
    ("affine", "elementwise_affine"),
)
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(*constructors: str) -> Iterator[None]:
    """Let edits that are read within the block name these layers too: ``with trusting("my_package.norms:MyNorm"):``.

    For layers of your own: a file alone must not choose what is imported and run, so they are typed here.
    """
    token = _trusted.set((*_trusted.get(), *constructors))
    try:
        yield
    finally:
        _trusted.reset(token)


def constructor_name(layer: type[nn.Module]) -> str:
    """Return the name of a layer class, ``"module:Class"``; raises `StructureError` where it cannot be imported."""
    name = layer.__name__
    if getattr(nn, name, None) is layer:
        return f"torch.nn:{name}"
    if layer.__qualname__ != name or layer.__module__ == "__main__":
        raise StructureError(
            f"{layer.__qualname__} cannot be named in an edit: define it at the top of a module that can be imported."
        )
    return f"{layer.__module__}:{name}"


def check_constructor(name: Any) -> str:
    """Return `name` if an edit that was read may name it; raises `FileFormatError` otherwise."""
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        raise FileFormatError(f"a layer must be named 'module:Class', not {name!r:.80}.")
    if name not in _trusted.get() and not _in_libraries(name.partition(":")[0]):
        raise FileFormatError(
            f"layer {name!r}: a file may only name layers of convette, torch.nn, timm and torchvision. If you trust "
            "it, type it yourself: with convette.surgery.trusting(...)."
        )
    return name


def check_arguments(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object of plain JSON arguments; raises `FileFormatError` otherwise."""
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise FileFormatError("a layer's arguments must be an object of named values.")
    for key, item in value.items():
        if key in ("device", "dtype") or not is_plain(item):
            raise FileFormatError(f"argument {key!r} of a layer cannot be {item!r:.60}.")
    return dict(value)


def is_plain(value: Any, depth: int = 0) -> bool:
    """Tell whether `value` is a plain JSON value that a layer may be given: a number, a text, or a list of them."""
    if value is None or isinstance(value, bool | str):
        return not isinstance(value, str) or len(value) <= 200
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return isinstance(value, list | tuple) and depth < _DEPTH and all(is_plain(item, depth + 1) for item in value)


def layer_class(name: str) -> type[nn.Module]:
    """Return the class called ``"module:Class"``; raises `StructureError` where there is none."""
    try:
        found = load_symbol(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StructureError(f"there is no layer {name!r} ({error}).") from error
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        raise StructureError(f"{name!r} is no layer class.")
    # A module of a library also holds what it imported from elsewhere.
    if _in_libraries(name.partition(":")[0]) and not _in_libraries(found.__module__):
        raise StructureError(f"{name!r} is defined in {found.__module__}: name it there.")
    return found


def _in_libraries(home: str) -> bool:
    return any(home == library or home.startswith(f"{library}.") for library in _LIBRARIES)


def construct(name: str, arguments: Mapping[str, Any], seed: int, place: str) -> nn.Module:
    """Return a new layer; its random weights follow from `seed` and `place` alone, the global state is left alone.

    Raises `StructureError` where the class does not take the arguments, or would be too large.
    """
    given = {key: _tupled(value) for key, value in arguments.items()}
    made = layer_class(name)
    try:
        inspect.signature(made).bind(**given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed + zlib.crc32(place.encode())) % (1 << 63))
            _check_size(made, given, name)
            return made(**given)
    except StructureError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{name} cannot be made with {dict(arguments)!r:.200}: {reason}") from error


def _check_size(made: type[nn.Module], given: dict[str, Any], name: str) -> None:
    try:
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in made(**given).state_dict().values())
    except Exception:
        return  # Layers that compute with their values while being made: the real call tells.
    if size > _MOST_ELEMENTS:
        raise StructureError(f"{name} would hold {size:,} numbers with {given!r:.200}.")


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def listed(value: Any) -> Any:
    """Return `value` as JSON has it: tuples become lists."""
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


def from_attributes(old: nn.Module, key: str) -> tuple[bool, Any]:
    """Return whether a layer's attributes tell what it was given as constructor argument `key`, and what."""
    names = next((group for group in _SYNONYMS if key in group), (key,))
    for name in (key, *names):
        if not hasattr(old, name):
            continue
        value = getattr(old, name)
        if name == "bias":
            return True, isinstance(value, Tensor) or value is True
        if is_plain(value) and not (value is None and name != "padding_mode"):
            return True, value
    if key in ("affine", "elementwise_affine") and hasattr(old, "weight"):
        return True, old.weight is not None
    return False, None
