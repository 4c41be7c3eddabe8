"""Where a model came from: the constructor's name and its JSON arguments, attached to what it returns."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)


def attach_origin(model: M, constructor: str, arguments: dict[str, Any]) -> M:
    """Attach ``Origin(constructor, arguments)`` to `model`, so that it can be saved and rebuilt; return `model`."""
    try:
        from convette.surgery import Origin, set_origin
    except ImportError:  # TODO remove once surgery is there
        return model
    set_origin(model, Origin(constructor, arguments))
    return model


def with_origin(constructor: Callable[P, M]) -> Callable[P, M]:
    """Decorate a constructor of ours: the model it returns knows its origin, ``convette:<function name>``."""

    @functools.wraps(constructor)
    def build(*args: P.args, **kwargs: P.kwargs) -> M:
        bound = inspect.signature(constructor).bind(*args, **kwargs)
        bound.apply_defaults()
        return attach_origin(constructor(*args, **kwargs), f"convette:{constructor.__name__}", dict(bound.arguments))

    return build
