"""Looking into a network while it runs, and leaving it as it was: its modes, its gradients, its hooks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Let modes be changed for a while; on leaving, every module of `model` is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode for a while; every module's own mode comes back afterwards."""
    with keeping_modes(model):
        model.eval()
        yield


@contextmanager
def keeping_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let ``requires_grad`` of `tensors` be changed for a while; each one's own comes back afterwards."""
    needed = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, flag in needed:
            tensor.requires_grad_(flag)


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove all `handles` of hooks on leaving; those put into the list meanwhile too."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
