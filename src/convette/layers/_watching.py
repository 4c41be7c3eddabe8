"""Looking into a network while it runs, and leaving it as it was: its modes, its gradients, its hooks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, example: Any) -> Any:
    """Call `model` on an example: a tensor, a tuple of arguments or a dict of named arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


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


@contextmanager
def keeping_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Keep by name the latest output of each of the modules `names` while `model` runs; outputs are not detached."""
    kept: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: kept.__setitem__(name, output))
        for name in names
    ]
    with hooked(handles):
        yield kept
