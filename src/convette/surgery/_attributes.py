"""The sizes modules hold in Python: which attributes follow from the shapes of their parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.surgery._edits import Change, find_module


def attributes_of(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None) -> dict[str, Any]:
    """Return the sizes `module` must hold once its parameters have the new `shapes` and it has `groups` groups."""
    weight = shapes.get("weight")
    result: dict[str, Any] = {}
    if isinstance(module, _ConvNd):
        if weight is not None:
            result["groups"] = groups or module.groups
            wide, part = weight[0], weight[1] * result["groups"]
            result["in_channels"], result["out_channels"] = (wide, part) if module.transposed else (part, wide)
    elif isinstance(module, nn.Linear):
        if weight is not None:
            result = {"in_features": weight[1], "out_features": weight[0]}
    elif isinstance(module, _NormBase):
        known = weight or shapes.get("running_mean")
        if known is not None:
            result["num_features"] = known[0]
    elif isinstance(module, nn.GroupNorm):
        if weight is not None:
            result = {"num_channels": weight[0], "num_groups": groups or module.num_groups}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if weight is not None:
            result["normalized_shape"] = list(weight)
    elif isinstance(module, nn.PReLU):
        if weight is not None:
            result["num_parameters"] = weight[0]
    elif isinstance(module, nn.Embedding) and weight is not None:
        result = {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    return {name: value for name, value in result.items() if plain(getattr(module, name, value)) != value}


def plain(value: Any) -> Any:
    """Return sizes as JSON has them: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def like(value: Any, old: Any) -> Any:
    """Return the JSON sizes `value` in the Python type of `old`."""
    if isinstance(old, tuple):
        made = [like(item, old[k] if k < len(old) else 0) for k, item in enumerate(value)]
        return tuple(made)
    if isinstance(old, list):
        return [like(item, old[k] if k < len(old) else 0) for k, item in enumerate(value)]
    return value


def is_size(value: Any) -> bool:
    """Tell whether `value` is a whole number or a (nested) list of them."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_size(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def set_attributes(
    model: nn.Module,
    attributes: Mapping[str, Mapping[str, Any]],
    change: Change,
    find: Callable[[str], nn.Module] | None = None,
) -> None:
    """Set sizes on modules, only where the module holds a size of that name already; `find` finds them by name."""
    for name, values in attributes.items():
        module = find_module(model, name) if find is None else find(name)
        for key, value in values.items():
            old = module.__dict__.get(key)
            if key.startswith("_") or not is_size(old) or isinstance(old, int) != isinstance(value, int):
                raise StructureError(f"module {name!r} ({type(module).__name__}) holds no size called {key!r}.")
            module.__dict__[key] = like(value, old)
            change.undo.append(lambda module=module, key=key, old=old: module.__dict__.__setitem__(key, old))
