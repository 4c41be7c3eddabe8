"""Compiling kernels for this processor by Numba, where it is installed (the extra ``convette[sparse]``)."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any


def numba() -> Any | None:
    """Return the module Numba, None where it is not installed."""
    try:
        return importlib.import_module("numba")
    except ImportError:
        return None


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any] | None:
    """Return `function` (loops over arrays) compiled, once for all processes; None without Numba.

    Numba finds out at run time what the processor can (AVX-512, AVX2) and vectorises for it.
    """
    module = numba()
    if module is None:
        return None
    # Type-checked runs wrap every function; what is compiled is the function itself.
    plain = inspect.unwrap(function)
    try:
        return module.njit(cache=True, nogil=True, **options)(plain)
    except RuntimeError:
        # Nowhere to keep what was compiled (a read-only installation without a home): each process compiles for itself.
        return module.njit(nogil=True, **options)(plain)
