"""Where a model came from: the constructor's name and its JSON arguments, attached to what it returns."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from torch import nn

from convette.errors import FileFormatError, did_you_mean
from convette.surgery import Origin, set_origin

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)

# What a file may ask for; beyond it a damaged number would ask for all the memory there is.
_LARGEST_COUNT, _LARGEST_FACTOR, _LONGEST_LIST = 1_000_000, 8.0, 1000


def attach_origin(model: M, constructor: str, arguments: dict[str, Any]) -> M:
    """Attach ``Origin(constructor, arguments)`` to `model`, so that it can be saved and rebuilt; return `model`."""
    return set_origin(model, Origin(constructor, arguments))


def with_origin(constructor: Callable[P, M]) -> Callable[P, M]:
    """Decorate a constructor of ours: the model it returns knows its origin, ``convette:<function name>``."""

    @functools.wraps(constructor)
    def build(*args: P.args, **kwargs: P.kwargs) -> M:
        bound = inspect.signature(constructor).bind(*args, **kwargs)
        bound.apply_defaults()
        return attach_origin(constructor(*args, **kwargs), f"convette:{constructor.__name__}", dict(bound.arguments))

    return build


def check_arguments(constructor: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments read from a file against the names and types of `function`'s parameters; return them.

    Whole numbers where fractions are expected become fractions.

    Raises:
        FileFormatError: an argument the constructor does not have, of another type, or out of range.
    """
    parameters = inspect.signature(function).parameters
    checked: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in parameters:
            raise FileFormatError(f"origin {constructor!r}: no argument {name!r}.{did_you_mean(name, parameters)}")
        expected = parameters[name].annotation
        if not _fits(value, expected):
            choices = get_args(expected) if get_origin(expected) is Literal else None
            wanted = f"one of {', '.join(choices)}" if choices else _WANTED.get(expected, "something else")
            raise FileFormatError(f"origin {constructor!r}: argument {name!r} is {value!r:.60}, expected {wanted}.")
        checked[name] = float(value) if expected is float else tuple(value) if isinstance(value, list) else value
    return checked


_WANTED = {
    int: f"a whole number from 1 to {_LARGEST_COUNT:,}",
    float: f"a number from 0 to {_LARGEST_FACTOR:g}",
    tuple[int, ...]: f"a list of whole numbers from 1 to {_LARGEST_COUNT:,}",
}


def _fits(value: Any, expected: Any) -> bool:
    if get_origin(expected) is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if isinstance(value, bool):
        return False
    if get_origin(expected) is tuple:
        return isinstance(value, list | tuple) and len(value) <= _LONGEST_LIST and all(_fits(x, int) for x in value)
    if expected is int:
        return isinstance(value, int) and 1 <= value <= _LARGEST_COUNT
    if expected is float:
        return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= _LARGEST_FACTOR
    return False
