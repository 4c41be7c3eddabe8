"""Finding a layer by the name people use: its class, or the slug of its published system in the catalogue.

What a name stands for is put into a network in one of two ways: a class of layers is put in the place of another layer
or behind a module; a *placing function*, ``function(model, ...) -> nn.Module``, changes a network where its system
says (WeightAlign, IBN-Net). Nothing is registered: rooms are looked through, and rows of the catalogue name symbols.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from convette._catalogue import System, catalogue
from convette._symbols import load_symbol
from convette.errors import UsageError, did_you_mean

_HOME = "convette.layers"
PlacingFunction = Callable[..., nn.Module]


def is_placing(symbol: Any) -> bool:
    """Return whether `symbol` is a function from a network (its argument ``model``) and options to that network."""
    if not inspect.isfunction(symbol):
        return False
    signature = inspect.signature(symbol)
    return next(iter(signature.parameters), None) == "model" and signature.return_annotation is nn.Module


def is_layer(symbol: Any) -> bool:
    """Return whether `symbol` is a class of modules."""
    return inspect.isclass(symbol) and issubclass(symbol, nn.Module)


@cache
def public_layers() -> dict[str, type[nn.Module] | PlacingFunction]:
    """Return the public classes and placing functions of all rooms of `convette.layers` by name."""
    found: dict[str, type[nn.Module] | PlacingFunction] = {}
    home = importlib.import_module(_HOME)
    for info in pkgutil.iter_modules(home.__path__):
        if info.name.startswith("_"):
            continue
        room = importlib.import_module(f"{_HOME}.{info.name}")
        for name in getattr(room, "__all__", ()):
            symbol = getattr(room, name)
            if is_layer(symbol) or is_placing(symbol):
                found[name] = symbol
    return found


def find_layer(name: str) -> type[nn.Module] | PlacingFunction:
    """Return the class of layers or the placing function called `name`.

    `name` is the slug of a system (``"weight-align"``), a public name of a room of `convette.layers` (``"IBN"``), a
    layer of ``torch.nn`` (``"GroupNorm"``) or ``"module:Class"``. Raises `UsageError` with the nearest name.
    """
    known = public_layers()
    if name in known:
        return known[name]
    if ":" in name:
        return _symbol(name)
    system = next((row for row in catalogue() if row.slug == name and _home_of(row)), None)
    if system is not None:
        return _of_system(system)
    layer: Any = getattr(nn, name, None)
    if is_layer(layer):
        return layer
    options = [*known, *(row.slug for row in catalogue() if _home_of(row))]
    raise UsageError(f"no layer is called {name!r}.{did_you_mean(name, options)}")


def _symbol(name: str) -> Any:
    try:
        found = load_symbol(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"there is no layer {name!r} ({error}).") from error
    if not is_layer(found) and not is_placing(found):
        raise UsageError(f"{name!r} is neither a class of layers nor a function that places them in a network.")
    return found


def _home_of(system: System) -> str | None:
    """Return the module of a system that lives among the layers: its symbol's, else the file named by its slug."""
    if system.symbol is not None:
        home = system.symbol.partition(":")[0]
        return home if home.startswith(f"{_HOME}.") else None
    return _files().get(system.slug.replace("-", "_"))


@cache
def _files() -> dict[str, str]:
    """Return the modules of all rooms by the name of their file."""
    home = importlib.import_module(_HOME)
    found = {}
    for room in pkgutil.iter_modules(home.__path__):
        if room.ispkg:
            package = importlib.import_module(f"{_HOME}.{room.name}")
            for info in pkgutil.iter_modules(package.__path__):
                if not info.name.startswith("_"):
                    found[info.name] = f"{_HOME}.{room.name}.{info.name}"
    return found


def _of_system(system: System) -> type[nn.Module] | PlacingFunction:
    if system.symbol is not None:
        found = _symbol_or_none(system.symbol)
        if found is None:
            raise UsageError(
                f"{system.slug!r} ({system.name}) is no layer that a network can be converted to; see its page, "
                f"docs/{system.docs}."
            )
        return found
    # Not finished, but in the tree: the function named like the file, else its first public class of layers.
    home = importlib.import_module(str(_home_of(system)))
    named: Any = getattr(home, home.__name__.rpartition(".")[2], None)
    if is_placing(named):
        return named
    public = public_layers()
    for symbol in vars(home).values():
        if is_layer(symbol) and symbol.__module__ == home.__name__ and public.get(symbol.__name__) is symbol:
            return symbol
    raise UsageError(f"{system.slug!r} ({system.name}) is no layer that a network can be converted to.")


def _symbol_or_none(name: str) -> Any:
    found = load_symbol(name)
    return found if is_layer(found) or is_placing(found) else None
