"""What a shrunk network must compute: the whole network with the removed channels left out of everything.

Removed channels are zeroed wherever they are made or read. Where a function computes a statistic over channels
(`ChannelGraph.scopes`) zeros would still count, so that call alone is carried out on what stays.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convette.layers._watching import call
from convette.surgery._calls import function_name, tensors_in
from convette.surgery._edits import Shrink, find_tensor
from convette.surgery._graph import ChannelGraph
from convette.surgery._records import Layers, Scope
from convette.surgery._rules import READS
from convette.surgery._sizes import Expectation
from convette.surgery._trace import evaluating, outputs_of
from convette.surgery._walk import Kept, Walk


def keeping_of(graph: ChannelGraph, edit: Shrink) -> Tensor:
    """Return, by root, which labels of `graph` stay under `edit`."""
    keep = torch.ones(len(graph.roots), dtype=torch.bool)
    slots = {(slot.parameter, slot.dim): slot for slot in graph.slots()}
    for key, indices in edit.kept.items():
        slot = slots.get(key)
        if slot is not None:
            gone = torch.ones(len(slot.labels), dtype=torch.bool)
            gone[list(indices)] = False
            keep[graph.roots[slot.labels[gone]]] = False
    return keep


def expected_outputs(graph: ChannelGraph, edit: Shrink) -> list[Tensor]:
    """Return what `graph.model`, shrunk by `edit`, must give on the graph's example (floating-point outputs only)."""
    model = graph.model
    mode = _LeaveOut(graph, Expectation(graph.roots, keeping_of(graph, edit)))
    # The run has to be, call for call, the one that was labelled: that had no tables from earlier runs to go by.
    attributes = Kept(Walk(model))
    attributes.forget()
    saved = _zeroed(model, edit.kept)
    try:
        with evaluating(model), mode:
            result = call(model, graph.example)
        return [tensor.clone() for tensor in outputs_of(result, []) if tensor.is_floating_point()]
    finally:
        attributes.restore()
        with torch.no_grad():
            for tensor, values in saved:
                tensor.copy_(values)


def _zeroed(model: nn.Module, kept: Mapping[tuple[str, int], tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for (name, dim), indices in kept.items():
            tensor = find_tensor(model, name)
            if not tensor.is_floating_point() or name.endswith("running_var"):
                continue
            saved.setdefault(id(tensor), (tensor, tensor.clone()))
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            gone[list(indices)] = False
            tensor.index_fill_(dim, gone.nonzero().view(-1), 0)
    return list(saved.values())


class _LeaveOut(TorchFunctionMode):
    """Carries out the calls with statistics over channels on what stays, and puts zeros where the rest was."""

    def __init__(self, graph: ChannelGraph, expectation: Expectation) -> None:
        super().__init__()
        self.scopes = {scope.call: scope for scope in graph.records.scopes}
        self.expectation = expectation
        self.index = 0
        self._names: dict[Any, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = function_name(func)
        if name in READS:
            return func(*args, **kwargs)
        scope = self.scopes.get(self.index)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) or name == "__setitem__" or tensors_in(out, []):
            self.index += 1
            if scope is not None:
                out = self._without(scope, func, name, args, kwargs, out)
        return out

    def _without(self, scope: Scope, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        position = iter(range(len(scope.inputs)))

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._cut(value, scope.inputs[next(position)])
            if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
                return type(value)(cut(item) for item in value)
            return value

        args = [cut(item) for item in args]
        kwargs = {key: cut(item) for key, item in kwargs.items()}
        if name in ("layer_norm", "rms_norm"):
            sizes = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            args[1:2] = [tuple(args[0].shape[-len(sizes) :])]
            kwargs.pop("normalized_shape", None)
        small = func(*args, **kwargs)
        if isinstance(out, Tensor):
            return self._back(small, out, scope.outputs[0])
        parts = [self._back(a, b, layers) for a, b, layers in zip(small, out, scope.outputs, strict=True)]
        return tuple(parts)

    def _cut(self, tensor: Tensor, layers: Layers) -> Tensor:
        for axis in range(tensor.ndim):
            stay = self.expectation.along(layers, axis)
            if stay is not None:
                tensor = tensor.index_select(axis, stay.nonzero().view(-1).to(tensor.device))
        return tensor

    def _back(self, small: Tensor, like: Tensor, layers: Layers) -> Tensor:
        for axis in range(small.ndim):
            stay = self.expectation.along(layers, axis)
            if stay is not None:
                wide = small.new_zeros([*small.shape[:axis], len(stay), *small.shape[axis + 1 :]])
                small = wide.index_copy(axis, stay.nonzero().view(-1).to(small.device), small)
        return small
