"""What modules keep beside their parameters: tables from earlier runs, and lists of their weights."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_cache(name: str, value: Any) -> bool:
    """Tell whether an attribute is such a table: tensors in a dict (``attention_bias_cache`` and the like)."""
    if "cache" not in name or name[0] == "_" or not isinstance(value, dict):
        return False
    return all(isinstance(item, Tensor) for item in value.values())


def forget_caches(modules: Iterable[nn.Module]) -> None:
    """Empty the tables of `modules`."""
    for module in modules:
        if type(module).__module__.startswith("torch.nn."):
            continue  # PyTorch's own modules keep nothing.
        for name, value in vars(module).items():
            if is_cache(name, value):
                value.clear()


def gather_weights(modules: Iterable[nn.Module]) -> None:
    """Let recurrent layers among `modules` list their weights anew: they hand that list to PyTorch's kernels."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
