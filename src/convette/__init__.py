"""convette: small, fast ConvNets, made to measure.

Data (or a network) and a budget go in; a trained network that fits comes out, measured, explained and exported.
Everything public is reached from here and imported when first used, so that ``import convette`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Rooms (sub-packages) are reached as attributes too.
_PUBLIC = {
    "fit": "convette.pipeline",
    "compare": "convette.pipeline",
    "train": "convette.training",
    "evaluate": "convette.training",
    "prune": "convette.pruning",
    "quantize": "convette.quantization",
    "convert": "convette.surgery",
    "fold": "convette.surgery",
    "grow": "convette.surgery",
    "trace": "convette.surgery",
    "create_model": "convette.models",
    "load": "convette.models",
    "save": "convette.models",
    "load_data": "convette.data",
    "export": "convette.runtime",
    "catalogue": "convette._catalogue",
    "Budget": "convette.cost",
    "ConvetteError": "convette.errors",
}
_ROOMS = (
    "cost",
    "data",
    "errors",
    "explain",
    "layers",
    "models",
    "pipeline",
    "pruning",
    "quantization",
    "report",
    "runtime",
    "surgery",
    "tasks",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"convette.{name}")
    raise AttributeError(f"module 'convette' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_ROOMS})
