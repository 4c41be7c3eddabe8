"""Replacing modules inside a network, and carrying over what they have learned."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class TakesOver(Protocol):
    """A layer that can carry over what the one it replaces has learned, where names and shapes do not say how."""

    def take_over(self, old: nn.Module) -> None:
        """Copy what `old` has learned, as far as it means something here; a layer of another kind is left alone."""
        ...


def replace_modules(model: nn.Module, choose: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Put ``choose(name, module)`` in the place of every module for which it is not None; return the network.

    In place, but for the root, which may be replaced itself. Outer modules are asked first, and what was put in is not
    looked into. A module that is used in several places is asked once and replaced in all of them.
    """
    chosen: dict[nn.Module, nn.Module | None] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module in chosen:
            return chosen[module] or module
        chosen[module] = new = choose(name, module)
        if new is not None:
            return new
        for child_name, child in list(module.named_children()):
            replaced = visit(f"{name}.{child_name}" if name else child_name, child)
            if replaced is not child:
                # named_children yields a shared module once: look for the same object under every name.
                for key, value in module._modules.items():
                    if value is child:
                        module._modules[key] = replaced
        return module

    return visit("", model)
