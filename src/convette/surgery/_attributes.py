"""The sizes modules hold in Python: which attributes follow from the shapes of their parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.surgery._edits import Change, find_module
from convette.surgery._walk import Walk

Slot = tuple[str, int]
Attributes = dict[str, dict[str, Any]]


_KNOWN = (
    _ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.MultiheadAttention
)  # fmt: skip


def _attributes_of(
    kind: type, held: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], groups: int | None
) -> dict[str, Any]:
    """Return the sizes a module of class `kind`, which holds the sizes `held`, must hold once its parameters have the
    new `shapes` and it has `groups` groups; those that stay are left out."""
    weight = shapes.get("weight")
    result: dict[str, Any] = {}
    if issubclass(kind, _ConvNd):
        if weight is not None:
            result["groups"] = groups or held["groups"]
            wide, part = weight[0], weight[1] * result["groups"]
            result["in_channels"], result["out_channels"] = (wide, part) if held["transposed"] else (part, wide)
    elif issubclass(kind, nn.Linear):
        if weight is not None:
            result = {"in_features": weight[1], "out_features": weight[0]}
    elif issubclass(kind, _NormBase):
        known = weight or shapes.get("running_mean")
        if known is not None:
            result["num_features"] = known[0]
    elif issubclass(kind, nn.GroupNorm):
        if weight is not None:
            result = {"num_channels": weight[0], "num_groups": groups or held["num_groups"]}
    elif issubclass(kind, nn.LayerNorm | nn.RMSNorm):
        if weight is not None:
            result["normalized_shape"] = list(weight)
    elif issubclass(kind, nn.PReLU):
        if weight is not None:
            result["num_parameters"] = weight[0]
    elif issubclass(kind, nn.Embedding) and weight is not None:
        result = {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    return {name: value for name, value in result.items() if plain(held.get(name, value)) != value}


class _Holder(NamedTuple):
    """A module whose attributes follow from the shapes of its parameters, as it was found."""

    name: str
    kind: type
    held: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    slots: list[tuple[str, int, Slot]]  # its own name of a parameter, a dimension of it, and what both are called


class HeldSizes:
    """The sizes that the modules of a network hold of their parameters, found once for any number of cuts."""

    def __init__(self, walk: Walk, slots: Iterable[Slot]) -> None:
        """`slots`: the parameters (by name) and dimensions that may become shorter, in the network of `walk`."""
        owners: dict[str, list[tuple[str, int, Slot]]] = {}
        for slot in slots:
            for name in walk.names_of(slot[0]):
                owner, _, leaf = name.rpartition(".")
                owners.setdefault(owner, []).append((leaf, slot[1], slot))
        # (module, attribute, its value, the slot whose length it is): all there is to know of the commonest modules.
        self._lengths: list[tuple[str, str, int, Slot]] = []
        self._others: list[_Holder] = []
        for owner, found in owners.items():
            module = walk.module(owner)
            lengths = _lengths_of(module)
            if lengths is not None:
                for leaf, dim, slot in found:
                    key = lengths.get((leaf, dim))
                    if key is not None and key in vars(module):
                        self._lengths.append((owner, key, vars(module)[key], slot))
            elif isinstance(module, _KNOWN):
                held = {key: value for key, value in vars(module).items() if key[0] != "_"}
                tensors = {**module._parameters, **module._buffers}
                shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items() if tensor is not None}
                self._others.append(_Holder(owner, type(module), held, shapes, found))

    def after(self, lengths: Mapping[Slot, int], groups: Mapping[str, int]) -> tuple[Attributes, tuple[str, ...]]:
        """Return the sizes that change once slots have new `lengths` and modules new numbers of `groups`, by module,
        and the names of the attentions with other heads."""
        result: Attributes = {}
        for owner, key, held, slot in self._lengths:
            length = lengths.get(slot)
            if length is not None and length != held:
                result.setdefault(owner, {})[key] = length
        free = []
        for name, kind, held, whole, slots in self._others:
            changed: dict[str, dict[int, int]] = {}
            for leaf, dim, slot in slots:
                length = lengths.get(slot)
                if length is not None:
                    changed.setdefault(leaf, {})[dim] = length
            if not changed:
                continue
            shapes = dict(whole)
            for leaf, dims in changed.items():
                shapes[leaf] = tuple(dims.get(dim, size) for dim, size in enumerate(whole[leaf]))
            values = _attributes_of(kind, held, shapes, groups.get(name))
            if issubclass(kind, nn.MultiheadAttention):
                free.append(name)
                packed = "in_proj_weight" if "in_proj_weight" in whole else "q_proj_weight"
                if 0 in changed.get(packed, {}):
                    rows = changed[packed][0] // (3 if packed == "in_proj_weight" else 1)
                    values["num_heads"] = rows // held["head_dim"]
            if values:
                result[name] = values
        return result, tuple(free)


def _lengths_of(module: nn.Module) -> Mapping[tuple[str, int], str] | None:
    """Return which attributes of a module are just the length of a parameter, None where there is more to it."""
    if isinstance(module, _ConvNd):
        plain_one = module.groups == 1 and not module.transposed
        return {("weight", 1): "in_channels", ("weight", 0): "out_channels"} if plain_one else None
    if isinstance(module, nn.Linear):
        return {("weight", 1): "in_features", ("weight", 0): "out_features"}
    if isinstance(module, _NormBase):
        return {("running_mean" if module._parameters.get("weight") is None else "weight", 0): "num_features"}
    if isinstance(module, nn.RNNBase):
        return {("weight_ih_l0", 1): "input_size", ("weight_hh_l0", 1): "hidden_size"}
    return None


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
    before: list[tuple[dict[str, Any], str, Any]] = []
    change.undo.append(lambda: _put_back(before))
    for name, values in attributes.items():
        module = find_module(model, name) if find is None else find(name)
        own = module.__dict__
        for key, value in values.items():
            old = own.get(key)
            if type(old) is int and type(value) is int and key[0] != "_":
                new = value
            elif key.startswith("_") or not is_size(old) or isinstance(old, int) != isinstance(value, int):
                raise StructureError(f"module {name!r} ({type(module).__name__}) holds no size called {key!r}.")
            else:
                new = like(value, old)
            before.append((own, key, old))
            own[key] = new


def _put_back(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    for own, key, old in reversed(before):
        own[key] = old
