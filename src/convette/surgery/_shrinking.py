"""From a set of kept labels to the `Shrink` edit: parameters, module attributes, sizes written in Python."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.surgery._attributes import attributes_of
from convette.surgery._cutting import KeptIndices
from convette.surgery._edits import Shrink, find_module
from convette.surgery._graph import ChannelGraph
from convette.surgery._probing import Attributes
from convette.surgery._probing import probed as _probed
from convette.surgery._records import SizeCall
from convette.surgery._sizes import Expectation
from convette.surgery._walk import Walk, collecting_later

Lengths = Mapping[tuple[str, int], int]


def shrink_edit(graph: ChannelGraph, keep: Tensor) -> Shrink:
    """Return the edit that leaves what `keep` (Bool, by root) says."""
    with collecting_later():
        return _shrink_edit(graph, keep)


def _shrink_edit(graph: ChannelGraph, keep: Tensor) -> Shrink:
    walk = Walk(graph.model)
    kept = _kept_indices(graph, keep)
    expectation = Expectation(graph.roots, keep)
    groups = _new_groups(graph, expectation)
    lengths = {slot: index.shape[0] for slot, index in kept.tensors.items()}
    attributes, free = _new_attributes(walk, lengths, groups)
    edit = Shrink(kept, attributes, free)
    items = {}
    for item in [*graph.records.sizes, *graph.records.scalars.values()]:
        if item.kind in ("groups", "normalized_shape") and _follows(walk.module(item.module), item):
            continue
        sizes = expectation.sizes(item)
        if sizes is not None:
            items[item.call] = (item, sizes)
    needed = items or graph.records.unseen
    return _probed(graph, edit, items, walk) if needed and edit.kept else edit


class _Columns:
    """The slots of a graph by the labels they share: what stays is worked out once for each different list."""

    def __init__(self, graph: ChannelGraph) -> None:
        slots = graph.slots()
        places: dict[int, int] = {}
        labels: list[Tensor] = []
        self.slots: list[tuple[tuple[str, int], int]] = []
        for slot in slots:
            place = places.get(id(slot.labels))
            if place is None:
                place = places[id(slot.labels)] = len(labels)
                labels.append(slot.labels)
            self.slots.append(((slot.parameter, slot.dim), place))
        self.sizes = [column.shape[0] for column in labels]
        self.roots = graph.roots[torch.cat(labels)] if labels else torch.zeros(0, dtype=torch.int64)
        ends = torch.tensor(self.sizes, dtype=torch.int64).cumsum(0)
        self.starts = (ends - torch.tensor(self.sizes, dtype=torch.int64)).repeat_interleave(
            torch.tensor(self.sizes, dtype=torch.int64)
        )
        self.ends = ends

    def kept(self, keep: Tensor) -> list[Tensor]:
        """Return the indices that stay of each column."""
        stays = keep[self.roots]
        found = stays.nonzero().view(-1)
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])[self.ends].diff(
            prepend=torch.zeros(1, dtype=torch.int64)
        )
        return list((found - self.starts[found]).split(counts.tolist()))


def _kept_indices(graph: ChannelGraph, keep: Tensor) -> KeptIndices:
    columns = vars(graph).get("_columns")
    if columns is None:
        columns = vars(graph)["_columns"] = _Columns(graph)
    result: dict[tuple[str, int], Tensor] = {}
    if not columns.slots:
        return KeptIndices(result)
    kept = columns.kept(keep)
    # One tensor for equal lists: they are checked, compared and written once.
    known: dict[bytes, Tensor] = {}
    short = [index.shape[0] < size for index, size in zip(kept, columns.sizes, strict=True)]
    for place, index in enumerate(kept):
        if short[place]:
            kept[place] = known.setdefault(index.numpy().tobytes(), index)
    for slot, place in columns.slots:
        if short[place]:
            if not kept[place].shape[0]:
                raise StructureError(f"nothing would be left of {slot[0]!r}.")
            result[slot] = kept[place]
    return KeptIndices(result)


def _new_groups(graph: ChannelGraph, expectation: Expectation) -> dict[str, int]:
    """Return how many groups each grouped convolution or normalisation has left, by module."""
    result = {}
    for item in graph.records.sizes:
        if item.kind == "groups":
            sizes = expectation.sizes(item)
            if sizes is not None:
                result[item.module] = sizes[0][0]
    return result


def _follows_from_class(model: nn.Module, item: SizeCall) -> bool:
    """Tell whether the size in a call comes from an attribute that `attributes_of` sets."""
    return item.kind in ("groups", "normalized_shape") and _follows(find_module(model, item.module), item)


def _follows(module: nn.Module, item: SizeCall) -> bool:
    if item.kind == "groups":
        return isinstance(module, _ConvNd | nn.GroupNorm)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None


def _static_attributes(
    model: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]], groups: Mapping[str, int]
) -> tuple[Attributes, tuple[str, ...]]:
    """Return the sizes modules must hold once parameters keep the indices in `kept`, and the attentions with fewer
    heads."""
    return _new_attributes(Walk(model), {slot: len(indices) for slot, indices in kept.items()}, groups)


def _new_attributes(walk: Walk, lengths: Lengths, groups: Mapping[str, int]) -> tuple[Attributes, tuple[str, ...]]:
    touched: dict[str, dict[str, dict[int, int]]] = {}
    for (name, dim), length in lengths.items():
        owner, _, leaf = name.rpartition(".")
        touched.setdefault(owner, {}).setdefault(leaf, {})[dim] = length
    if walk.shared:
        # A parameter shared by several modules is listed under one name; the others hold the same tensor.
        touched = _with_other_owners(walk.model, touched)
    attributes: Attributes = {}
    free = []
    for owner, leaves in touched.items():
        module = walk.module(owner)
        values = _plain_attributes(module, leaves)
        if values is None:
            shapes = {}
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    new = leaves.get(leaf, {})
                    shapes[leaf] = tuple(new.get(dim, size) for dim, size in enumerate(tensor.shape))
            values = attributes_of(module, shapes, groups.get(owner))
        if isinstance(module, nn.MultiheadAttention):
            free.append(owner)
            packed = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
            if packed in leaves and 0 in leaves[packed]:
                rows = leaves[packed][0] // (3 if packed == "in_proj_weight" else 1)
                values["num_heads"] = rows // module.head_dim
        if values:
            attributes[owner] = values
    return attributes, tuple(free)


def _plain_attributes(module: nn.Module, leaves: Mapping[str, Mapping[int, int]]) -> dict[str, Any] | None:
    """Return what `attributes_of` does for the commonest modules, None for all others."""
    weight = leaves.get("weight", {})
    if isinstance(module, _ConvNd):
        if module.groups != 1 or module.transposed:
            return None
        wanted = {"in_channels": weight.get(1), "out_channels": weight.get(0)}
    elif isinstance(module, nn.Linear):
        wanted = {"in_features": weight.get(1), "out_features": weight.get(0)}
    elif isinstance(module, _NormBase) and (weight or module._parameters.get("weight") is None):
        wanted = {"num_features": (weight or leaves.get("running_mean", {})).get(0)}
    else:
        return None
    held = module.__dict__
    return {name: value for name, value in wanted.items() if value is not None and held.get(name) != value}


def _with_other_owners(
    model: nn.Module, touched: dict[str, dict[str, dict[int, int]]]
) -> dict[str, dict[str, dict[int, int]]]:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    result: dict[str, dict[str, dict[int, int]]] = {}
    for owner, leaves in touched.items():
        module = find_module(model, owner)
        for leaf, dims in leaves.items():
            tensor = getattr(module, leaf)
            full = f"{owner}.{leaf}" if owner else leaf
            for name in names.get(id(tensor), [full]):
                other, _, other_leaf = name.rpartition(".")
                result.setdefault(other, {})[other_leaf] = dims
    return result
