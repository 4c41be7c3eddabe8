"""Removing features: a layer whose output is concatenated with others, as in DenseNet, goes with all its channels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import StructureError
from convette.layers._watching import call, hooked
from convette.surgery._attributes import HeldSizes
from convette.surgery._edits import Shrink
from convette.surgery._graph import ChannelGraph
from convette.surgery._groups import Group
from convette.surgery._placing import is_block
from convette.surgery._remove import Remove
from convette.surgery._trace import evaluating
from convette.surgery._trial import output_shapes, with_edits
from convette.surgery._walk import Walk


def remove_features(model: nn.Module, module: str, graph: ChannelGraph) -> tuple[Remove, Shrink]:
    """Return the edits that leave `module` out where what it gives is concatenated with other features.

    The module gives way to one that gives no channels; whatever reads the features loses its columns for them, norms
    their entries: what is gone is the module and the k columns of its k features in each later layer. Apply both
    together (``apply(model, *remove_features(...))``); they are proved by a run on the graph's example, and the model
    is as before when this returns. Raises `StructureError` where the module is no such layer (`removable_features`).
    Cost: three runs of the network.
    """
    group = _feature_groups(model, graph, (module,)).get(module)
    if group is None:
        raise StructureError(f"{module!r} gives no features that are concatenated with others; `remove` is for blocks.")
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    kept = {}
    for member in _outside(group, module):
        stays = torch.ones(tensors[member.parameter].shape[member.dim], dtype=torch.bool)
        stays[member.index.flatten()] = False
        kept[member.parameter, member.dim] = tuple(stays.nonzero().flatten().tolist())
    lengths = {slot: len(indices) for slot, indices in kept.items()}
    attributes, _ = HeldSizes(Walk(model), kept).after(lengths, {})
    edits = Remove(module, gives="nothing"), Shrink(kept, attributes)
    before = output_shapes(model, graph.example)
    failure = f"the network does not run without the features of {module!r}"
    after = with_edits(model, edits, lambda: output_shapes(model, graph.example), failure)
    if before != after:
        raise StructureError(f"without the features of {module!r} the outputs are {after}, not {before}.")
    return edits


def removable_features(model: nn.Module, graph: ChannelGraph) -> tuple[str, ...]:
    """Return the layers that `remove_features` could leave out: blocks with weights (numbered in a sequence, or with a
    sibling of their class) that read a list of feature maps and give one more, of which nothing is read alone.

    Cost: one run of the network.
    """
    return tuple(_feature_groups(model, graph, _reading_lists(model, graph.example)))


def _feature_groups(model: nn.Module, graph: ChannelGraph, names: Sequence[str]) -> dict[str, Group]:
    """Return those of the modules `names` that alone make all of one group, with it, and leave their readers others."""
    tensors: Mapping[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    found = {}
    for name in names:
        for group in graph.groups:
            outside = _outside(group, name)
            makers = group.of("producer")
            inside = makers and all(f"{m.module}.".startswith(f"{name}.") for m in makers)
            gone = sum(m.index.numel() for m in makers if m.parameter.endswith("weight"))
            last = {m.parameter: tensors[m.parameter].shape[m.dim] for m in makers if m.parameter.endswith("weight")}
            whole = gone == sum(last.values())  # all of what is made, not a part of it
            others = all(m.index.numel() < tensors[m.parameter].shape[m.dim] for m in outside)
            if inside and outside and whole and others and any(m.role == "consumer" for m in outside):
                found[name] = group
    return found


def _outside(group: Group, name: str) -> list[Any]:
    return [m for m in group.members if not f"{m.module}.".startswith(f"{name}.")]


def _reading_lists(model: nn.Module, example: Any) -> tuple[str, ...]:
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        maps = args[0] if args else None
        if isinstance(maps, list | tuple) and maps and all(isinstance(one, Tensor) for one in maps):
            name = names[id(module)]
            if isinstance(output, Tensor) and is_block(model, name):
                found[name] = None

    handles = [module.register_forward_hook(note) for module in model.modules()]
    with hooked(handles), evaluating(model):
        call(model, example)
    return tuple(found)
