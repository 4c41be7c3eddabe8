"""What a layer becomes at inference: a plain PyTorch layer that computes the same, or a reason why there is none.

The protocol is one method. A layer of these rooms has ``folded()``, which returns a new module that equals the layer in
eval mode, or raises `Stays` with the reason. A parametrization whose result no longer changes after training sets
``bakes = True``: its value can be written into the weight. `folded_form` asks both; whoever edits networks calls it.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.utils import parametrize

from convette.errors import StructureError
from convette.layers._modules import replace_modules


class Stays(StructureError):
    """A layer cannot become a plain one; the text says why."""


@runtime_checkable
class Foldable(Protocol):
    """A layer that knows what it becomes at inference."""

    def folded(self) -> nn.Module:
        """Return a new module that equals this one in eval mode, or raise `Stays`; this one is left as it is."""
        ...


@dataclass(frozen=True)
class FoldedLayers:
    """A network after `fold_layers`.

    Attributes:
        model: the folded copy, in eval mode.
        folded: module name -> what it became.
        kept: module name -> why it stayed.
    """

    model: nn.Module
    folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def folded_form(module: nn.Module) -> nn.Module | None:
    """Return what `module` becomes at inference; None for a module that is plain already. `module` is not changed.

    Children are not looked at. Raises `Stays` where the module says that it cannot become a plain one.
    """
    if isinstance(module, Foldable):
        return module.folded()
    if can_bake(module):
        return bake(copy.deepcopy(module))
    return None


def fold_layers(model: nn.Module) -> FoldedLayers:
    """Return a copy of `model` in eval mode in which every layer that can has become a plain one.

    Outer modules are asked first; the inside of one that stays is asked too. Batch norms are not folded into their
    convolutions here: `convette.surgery.fold` does that afterwards.
    """
    result = FoldedLayers(copy.deepcopy(model).eval())

    def form(name: str, module: nn.Module) -> nn.Module | None:
        try:
            found = folded_form(module)
        except Stays as reason:
            result.kept[name] = str(reason)
            return None
        if found is not None:
            result.folded[name] = type(found).__name__
            found.eval()
        return found

    return FoldedLayers(replace_modules(result.model, form), result.folded, result.kept)


def can_bake(module: nn.Module) -> bool:
    """Return whether all parametrizations of `module` (one at least) can be written into its parameters."""
    if not parametrize.is_parametrized(module):
        return False
    lists: Any = module.parametrizations
    return all(getattr(one, "bakes", False) for chain in lists.values() for one in chain)


@torch.no_grad()
def bake(module: nn.Module) -> nn.Module:
    """Write the values of the parametrizations of `module` into plain parameters, in place; return the module.

    Unlike torch's ``remove_parametrizations`` it leaves the class alone, which copies of the module share.
    """
    lists: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in lists}
    trained = {name: chain.original.requires_grad for name, chain in lists.items()}
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    made = {name: nn.Parameter(value, requires_grad=trained[name]) for name, value in values.items()}
    module._parameters = {**made, **module._parameters}
    return module
