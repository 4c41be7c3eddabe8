"""Putting a module in another's place, wherever it is held, and noting what that does to parameters."""

from torch import Tensor, nn

from convette.errors import StructureError
from convette.surgery._edits import Added, Change, ParameterChange, find_module


def place(model: nn.Module, name: str, new: nn.Module, change: Change) -> None:
    """Put `new` where the module `name` of `model` is held (all places, if shared); note how to go back.

    Parameters that are gone and those that came are noted; ones that both have are left alone. Raises
    `StructureError` for the model itself, which nothing holds.
    """
    old = find_module(model, name)
    if not name:
        raise StructureError("the model itself cannot be replaced; name a module within it.")
    before = dict(old.named_parameters(prefix=name))
    near = nearest(model, name)
    known = {id(parameter) for parameter in model.parameters()}
    for owner in list(model.modules()):
        for key, child in list(owner._modules.items()):
            if child is old:
                owner._modules[key] = new
                change.undo.append(lambda owner=owner, key=key: owner._modules.__setitem__(key, old))
    stay = {id(parameter) for parameter in model.parameters()}
    for label, parameter in before.items():
        if id(parameter) not in stay:
            change.parameters[label] = ParameterChange(parameter, None, {})
    for label, parameter in new.named_parameters(prefix=name):
        if id(parameter) not in known:
            change.added[label] = Added(parameter, near)


def nearest(model: nn.Module, name: str) -> Tensor | None:
    """Return the parameter that is trained and nearest to module `name`: its own first, else of a module around it.

    Only one: two optimisers that share the model between them must not both take what is put beside it.
    """
    path = name
    while True:
        trained = [parameter for parameter in find_module(model, path).parameters() if parameter.requires_grad]
        if trained or not path:
            return trained[0] if trained else None
        path = path.rpartition(".")[0]


def like_its_place(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Give `new` the device, floating-point type and mode of `old`, or of the model where `old` holds no tensor."""
    tensors = [tensor for tensor in [*old.parameters(), *old.buffers()] if tensor.is_floating_point()]
    tensors += [tensor for tensor in model.parameters() if tensor.is_floating_point()][:1]
    if tensors:
        new.to(device=tensors[0].device, dtype=tensors[0].dtype)
    return new.train(old.training)


def is_block(model: nn.Module, name: str) -> bool:
    """Tell whether module `name` is a block: at least two layers with weights in a module of its own kind (not merely
    an ``nn.Sequential``) that is numbered in a sequence or list, or has a sibling of its class."""
    if not name:
        return False
    module, (owner, _, leaf) = find_module(model, name), name.rpartition(".")
    if type(module) in (nn.Sequential, nn.ModuleList):
        return False
    holder = find_module(model, owner)
    numbered = leaf.isdigit() and isinstance(holder, nn.Sequential | nn.ModuleList)
    if not numbered and sum(type(other) is type(module) for other in holder.children()) < 2:
        return False
    layers = [part for part in module.modules() if any(p.ndim > 1 for p in part.parameters(recurse=False))]
    return len(layers) > 1
