"""Reading a function call that PyTorch hands to a mode: its name, its tensors, its numbers, its source line."""

import functools
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHECKER = f"{os.sep}jaxtyping{os.sep}"
_ROOT = f"{Path(__file__).parent.parent}{os.sep}"
_HIDDEN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")


def source_line() -> str:
    """Return ``file:line`` of the network's code that is running, leaving out PyTorch's own files and ours."""
    frame = sys._getframe(1)
    while frame is not None:
        place = _place(frame.f_code.co_filename)
        if place:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@functools.cache
def _place(file: str) -> str:
    """Return a file with its folder; nothing for files that are not the network's."""
    if file.startswith((*_HIDDEN, "<")) or _CHECKER in file:
        return ""
    return f"{Path(file).parent.name}/{Path(file).name}"


def raised_at(error: BaseException) -> str:
    """Return ``file:line`` of the innermost line of the network's code that `error` came through, "?" for none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = frame.filename
        ours = name.startswith(_ROOT) and not name.startswith((f"{_ROOT}models{os.sep}", f"{_ROOT}layers{os.sep}"))
        if not ours and not name.startswith((*_HIDDEN, "<")) and _CHECKER not in name:
            return f"{Path(name).parent.name}/{Path(name).name}:{frame.lineno}"
    return "?"


def tensors_in(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Collect the tensors in nested lists, tuples and dicts into `found`."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    return found


def inputs_of(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call, in order."""
    found: list[Tensor] = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | dict) and item:
            tensors_in(item, found)
    return found


def numbers_in(args: Iterable[Any]) -> tuple[int | float, ...]:
    """Return the Python numbers among the arguments of a call."""
    return tuple(item for item in args if isinstance(item, int | float) and not isinstance(item, bool))


def function_name(func: Any) -> str:
    """Return a plain name for a function PyTorch hands to a mode: in-place and operator forms fold into one."""
    name = getattr(func, "__name__", "") or ""
    home = getattr(func, "__module__", None) or ""
    if name == "__get__":
        return "." + getattr(func.__self__, "__name__", "?")
    if name == "unfold" and home == "torch.nn.functional":
        return "im2col"
    if home.startswith("torch._ops."):
        return f"{home.removeprefix('torch._ops.')}::{name}"
    if home and not home.startswith("torch"):
        return f"{home}.{name}"
    if name.startswith("__") and name.endswith("__"):
        return name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def family(name: str) -> str:
    """Return the name under which calls are counted: all ways to split count as one, as each can stand for another."""
    return "split" if name in ("chunk", "tensor_split", "split_with_sizes") else name
