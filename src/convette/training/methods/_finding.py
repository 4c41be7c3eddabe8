"""Finding training methods: by name, or because a layer of the network names the one it is trained with.

A layer class says so by an attribute ``training_method``, the method's symbol as text (``"module:Class"``): layers
stand below training and import nothing of it.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import nn

from convette._symbols import load_symbol
from convette.errors import UsageError, did_you_mean
from convette.training.events import Method

# Named as text, like the layers' methods: this room imports nothing of the pruning room above it.
_HOMES = ("convette.training.methods", "convette.pruning.methods")


@cache
def _known() -> dict[str, type[Any]]:
    """Return the methods by the slug of their file, and by class."""
    found: dict[str, type[Any]] = {}
    names = [
        f"{home}.{info.name}"
        for home in _HOMES
        for info in pkgutil.iter_modules(importlib.import_module(home).__path__)
        if not info.name.startswith("_")
    ]
    for module in names:
        home = importlib.import_module(module)
        for name, symbol in vars(home).items():
            if _is_method(symbol) and symbol.__module__ == home.__name__ and name[0] != "_":
                found.setdefault(module.rpartition(".")[2].replace("_", "-"), symbol)
                found[name] = symbol
    return found


def _is_method(symbol: Any) -> bool:
    return inspect.isclass(symbol) and Method in symbol.__mro__[1:]


def find_method(name: str) -> type[Any]:
    """Return the training method called `name`: the slug of its system ("norm-loss") or its class ("NormLossTraining").

    Raises `UsageError` with the nearest name.
    """
    known = _known()
    if name not in known:
        raise UsageError(f"no training method is called {name!r}.{did_you_mean(name, known)}")
    return known[name]


def check_options(method: type[Any], options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an option that `method` does not take, or one it needs that is missing."""
    signature = dict(list(inspect.signature(method.__init__).parameters.items())[1:])
    known = [key for key in signature if key not in _GIVEN]
    missing = [key for key in known if signature[key].default is inspect.Parameter.empty and key not in options]
    if missing:
        raise UsageError(f"{method.__name__} needs {', '.join(missing)}; where that is no number or text, use Python.")
    for key in options:
        if key not in known:
            raise UsageError(f"{method.__name__} takes no option {key!r}.{did_you_mean(key, known)}")


# Arguments that the one who trains fills in.
_GIVEN = ("preprocessing", "data")


def make_method(method: type[Any], options: Mapping[str, Any], data: Any = None) -> Method:
    """Return a method made with `options`; `data` (an `ImageData`) gives what it asks for besides."""
    given = dict(options)
    if "preprocessing" in inspect.signature(method.__init__).parameters and data is not None:
        given["preprocessing"] = data.preprocessing
    if "data" in inspect.signature(method.__init__).parameters and data is not None:
        given["data"] = data
    return method(**given)


def methods_of(
    model: nn.Module, data: Any = None, *, leave: Callable[[type[nn.Module]], bool] | None = None
) -> list[Method]:
    """Return the methods that the layers of `model` are trained with, one of a kind, with their default options.

    `leave` says which classes of layers go without theirs.
    """
    names: dict[str, None] = {}
    for module in model.modules():
        name = getattr(type(module), "training_method", None)
        if isinstance(name, str) and not (leave is not None and leave(type(module))):
            names[name] = None
    return [make_method(_symbol(name), {}, data) for name in names]


def with_own(model: nn.Module, methods: Iterable[Method], data: Any = None, **leave: Any) -> list[Method]:
    """Return `methods` and those that layers of `model` bring along, but for kinds that `methods` has already."""
    given = list(methods)
    return [*given, *(own for own in methods_of(model, data, **leave) if type(own) not in map(type, given))]


def _symbol(name: str) -> type[Any]:
    found = load_symbol(name)
    if not _is_method(found):
        raise UsageError(f"{name!r} is no training method.")
    return found
