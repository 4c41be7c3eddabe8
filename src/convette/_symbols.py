"""What a name like ``"module:symbol"`` stands for: how tables name functions of modules that are not imported yet."""

from importlib import import_module
from typing import Any


def load_symbol(name: str) -> Any:
    """Return what ``"module:symbol"`` names; its module is imported, which runs it.

    Raises what importing raises (`ImportError`), `AttributeError` for a symbol that is not there, and `ValueError` for
    a name without a module.
    """
    home, _, symbol = name.partition(":")
    return getattr(import_module(home), symbol)
