"""Label rules of the functions that take tensors apart, by position or index, and put them together again."""

from typing import Any

import torch
from torch import Tensor

from convette.surgery._labels import inhabited, spread, varying, vector_of
from convette.surgery._records import Call, Fixed, Layers, Operand, Value
from convette.surgery._rules_move import _clean, _with_boxes
from convette.surgery._tracer import Tracer


def _one_dim(call: Call, position: int, default: int = 0) -> int:
    dim = call.argument(position, "dim", default)
    dim = call.kwargs.get("axis", dim)
    return dim % call.first.ndim


def _pieces(tracer: Tracer, call: Call, axis: int, spans: list[tuple[int, int]]) -> list[Layers]:
    inputs = tracer.layers(call.first)
    result = []
    for start, length in spans:
        piece = tuple(layer.narrow(axis, start, length) for layer in inputs)
        result.append(_only_varying(tracer, inputs, axis, piece))
    return result


def _only_varying(tracer: Tracer, inputs: Layers, axis: int, piece: Layers) -> Layers:
    # A single channel cut out: it may go only if the whole axis does not depend on it.
    for layer, out in zip(inputs, piece, strict=True):
        if out.shape[axis] == 1 and axis in varying(layer):
            tracer.records.fixed.append(Fixed(layer, axis, out))
    return tuple(out for out in piece if varying(out))


def split(tracer: Tracer, call: Call) -> list[Layers]:
    """``split``, ``chunk``, ``tensor_split``: pieces of the labels; their sizes are noted."""
    axis = _one_dim(call, 2)
    spans, start = [], 0
    for out in call.out:
        spans.append((start, out.shape[axis]))
        start += out.shape[axis]
    inputs = tracer.layers(call.first)
    outs = _pieces(tracer, call, axis, spans)
    if any(axis in varying(layer) for layer in inputs):
        tracer.sized(call, "split", inputs, outs, axis, [length for _, length in spans])
    return outs


def unbind(tracer: Tracer, call: Call) -> list[Layers]:
    """``unbind``: one piece for each index; the axis must keep its length."""
    axis = _one_dim(call, 1)
    return [_selected(tracer, call, axis, index) for index in range(len(call.out))]


def _selected(tracer: Tracer, call: Call, axis: int, index: int) -> Layers:
    result = []
    for layer in tracer.layers(call.first):
        out = layer.select(axis, index)
        if axis in varying(layer):
            tracer.records.fixed.append(Fixed(layer, axis, out))
        if varying(out):
            result.append(out)
    return _with_boxes(tracer, call, tuple(result))


def select(tracer: Tracer, call: Call) -> Layers:
    """``select``: one index of an axis, which must keep its length."""
    axis = _one_dim(call, 1)
    return _selected(tracer, call, axis, call.argument(2, "index") % call.first.shape[axis])


def narrow(tracer: Tracer, call: Call) -> Layers:
    """``narrow``: a span of an axis."""
    axis = _one_dim(call, 1)
    start, length = int(call.argument(2, "start")) % call.first.shape[axis], call.out.shape[axis]
    inputs = tracer.layers(call.first)
    out = _pieces(tracer, call, axis, [(start, length)])[0]
    if any(axis in varying(layer) for layer in inputs):
        tracer.sized(call, "slice", inputs, [out], axis, [(axis, start, start + length)])
    return out


def index_items(index: Any, ndim: int) -> list[Any]:
    """Return the items of ``x[index]`` with the ellipsis spelled out."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(_axes_used(item) for item in items)
    for position, item in enumerate(items):
        if item is Ellipsis:
            return [*items[:position], *[slice(None)] * (ndim - used), *items[position + 1 :]]
    return [*items, *[slice(None)] * (ndim - used)]


def _axes_used(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim
    return 1


def getitem(tracer: Tracer, call: Call) -> Layers:
    """``x[...]``: the same index on the labels; spans and single channels are noted."""
    source, index = call.args
    inputs = tracer.layers(source)
    spans: list[tuple[int, int, int]] = []
    singles: list[tuple[int, int]] = []
    gathers: list[tuple[int, Any]] = []
    axis = 0
    for item in index_items(index, source.ndim):
        size = source.shape[axis] if axis < source.ndim else 1
        touched = any(axis in varying(layer) for layer in inputs)
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if touched and step != 1:
                gathers.append((axis, item))
            # A whole span with its end written out is one when the axis grows.
            elif touched and ((start, stop) != (0, size) or item.stop is not None):
                spans.append((axis, start, stop))
        elif isinstance(item, int) and not isinstance(item, bool):
            if touched:
                singles.append((axis, item))
        elif touched and isinstance(item, Tensor | list | tuple):
            gathers.append((axis, item))
        axis += _axes_used(item)
    for axis, item in gathers:
        _gathered(tracer, call, inputs, axis, item)
    picked = {axis for axis, _ in gathers}
    inputs = tuple(layer for layer in inputs if not picked & set(varying(layer)))
    layers = tuple(_clean(layer[index], layer) for layer in inputs)
    for axis, chosen in singles:
        for layer in inputs:
            if axis in varying(layer):
                tracer.records.fixed.append(Fixed(layer, axis, layer.select(axis, chosen)))
    for axis, start, stop in spans:
        if stop - start == 1:
            for layer in inputs:
                if axis in varying(layer):
                    tracer.records.fixed.append(Fixed(layer, axis, layer.narrow(axis, start, 1)))
    layers = tuple(layer for layer in layers if varying(layer))
    if spans:
        tracer.sized(call, "slice", inputs, [layers], 0, spans)
    return _with_boxes(tracer, call, layers)


def _gathered(tracer: Tracer, call: Call, inputs: Layers, axis: int, item: Any) -> None:
    # Channels picked one by one: which indices they are is written in the code, so they stay. A table of numbers
    # looked up by position (relative positions) is the usual case and nothing to report.
    touched = [layer for layer in inputs if axis in varying(layer)]
    for layer in touched:
        tracer.store.freeze(layer, call.index)
    if not tracer.is_parameter(call.args[0]):
        tracer.report(call)


def setitem(tracer: Tracer, call: Call) -> Layers:
    """``x[...] = y``: what was there and what comes are the same channels."""
    target, index, new = call.args
    if not isinstance(new, Tensor) or new.ndim == 0:
        return tracer.layers(target)
    shape = target[index].shape
    if new.ndim == len(shape) == target.ndim:
        _given_labels(tracer, target, {axis for layer in tracer.layers(new) for axis in varying(layer)})
    if 0 in shape and new.ndim == target.ndim:
        # Nothing is written this time; what would be is still the same channels.
        for old in tracer.layers(target):
            for layer in tracer.layers(new):
                if varying(inhabited(old)) == varying(inhabited(layer)):
                    tracer.store.unite(old, layer, call.index)
        return tracer.layers(target)
    region = tuple(layer[index] for layer in tracer.layers(target))
    full = tuple(size > 1 for size in shape)
    if new.ndim > len(shape):
        new_layers: Layers = ()
        tracer.freeze(call)
    else:
        new_layers = tracer.operand(new, shape).layers
        full = tracer.operand(new, shape).full
    whole = tuple(size > 1 for size in shape)
    tracer.align([Operand(whole, region), Operand(full, new_layers)], call.index)
    _note_spans(tracer, call, target, index)
    if not tracer.layers(target) and new_layers:
        # Written into a tensor nobody labelled: what was written stays whole.
        for layer in new_layers:
            tracer.store.freeze(layer, call.index)
    return tracer.layers(target)


def _note_spans(tracer: Tracer, call: Call, target: Tensor, index: Any) -> None:
    inputs, spans, axis = tracer.layers(target), [], 0
    for item in index_items(index, target.ndim):
        if isinstance(item, slice) and any(axis in varying(layer) for layer in inputs):
            start, stop, _ = item.indices(target.shape[axis])
            if (start, stop) != (0, target.shape[axis]):
                spans.append((axis, start, stop))
        axis += _axes_used(item)
    if spans:
        tracer.sized(call, "slice", inputs, [], 0, spans)


def index_select(tracer: Tracer, call: Call) -> Layers:
    """``index_select``, ``gather``, ``take_along_dim``: chosen indices keep their place in a labelled axis."""
    axis = _one_dim(call, 1)
    inputs = tracer.layers(call.first)
    if any(axis in varying(layer) for layer in inputs):
        tracer.freeze(call)
        return ()
    if call.name == "index_select":
        return tuple(layer.narrow(axis, 0, 1).expand(call.out.shape) for layer in inputs)
    if call.first.shape == call.out.shape:
        return inputs
    result = [layer for layer in inputs if layer.ndim == call.out.ndim and varying(layer)]
    cut = tuple(slice(0, size) for size in call.out.shape)
    if any(layer.shape[a] < call.out.shape[a] for layer in result for a in varying(layer)):
        tracer.freeze(call)
        return ()
    return tuple(layer[cut].expand(call.out.shape) for layer in result)


def cat(tracer: Tracer, call: Call) -> Layers:
    """``cat``, ``concat``: labels are joined along the axis and the same channel across all the others."""
    parts = [part for part in call.argument(0, "tensors") if not (part.ndim == 1 and part.numel() == 0)]
    shape = call.out.shape
    axis = call.kwargs.get("axis", call.argument(1, "dim", 0)) % len(shape)
    cross = list(shape)
    cross[axis] = 1
    joined: list[Tensor | None] = []
    operands = []
    if any(axis in varying(layer) for part in parts for layer in tracer.layers(part)):
        for part in parts:
            _given_labels(tracer, part, {axis})
    for part in parts:
        along = [layer for layer in tracer.layers(part) if axis in varying(layer)]
        across = [layer for layer in tracer.layers(part) if axis not in varying(layer)]
        for extra in along[1:]:
            tracer.store.unite(along[0], extra, call.index)
        joined.append(along[0] if along else None)
        flat = tuple(layer.narrow(axis, 0, 1) for layer in across)
        # Axes on which the joined layer itself varies count as covered.
        covered = set(varying(along[0])) if along else set()
        full = tuple(size > 1 and a not in covered for a, size in enumerate(cross))
        operands.append(Operand(full, flat))
    layers = [layer.expand(*shape) for layer in tracer.align(operands, call.index)]
    if any(layer is not None for layer in joined):
        layers.append(_joined(parts, joined, axis, shape))
    return _with_boxes(tracer, call, tuple(layers))


def _joined(parts: list[Tensor], layers: list[Tensor | None], axis: int, shape: torch.Size) -> Tensor:
    if all(layer is not None and varying(layer) == (axis,) for layer in layers):
        return spread(torch.cat([vector_of(layer) for layer in layers if layer is not None]), axis, shape)
    # Only the axes some part varies on are stored.
    stored = {a for layer in layers if layer is not None for a in varying(layer)} | {axis}
    small = []
    for part, layer in zip(parts, layers, strict=True):
        if layer is None:
            layer = torch.zeros(1, dtype=torch.int64).expand(part.shape)
        index = tuple(slice(None) if a in stored else slice(0, 1) for a in range(len(shape)))
        small.append(layer[index])
    return torch.cat(small, axis).expand(shape)


def stack(tracer: Tracer, call: Call) -> Layers:
    """``stack``: the same channel in every tensor."""
    parts = list(call.argument(0, "tensors"))
    axis = call.argument(1, "dim", 0) % call.out.ndim
    layers = tracer.align([tracer.operand(part, part.shape) for part in parts], call.index)
    return tuple(layer.unsqueeze(axis).expand(call.out.shape) for layer in layers)


def _given_labels(tracer: Tracer, tensor: Tensor, axes: set[int]) -> Layers:
    """Return fresh labels for a blank tensor along `axes`, known from now on; () for any other tensor."""
    value = tracer.value(tensor)
    item = tracer.records.blanks.get(value.blank)
    if item is None:
        return ()
    layers = tuple(
        spread(tracer.store.fresh(tensor.shape[axis]), axis, tensor.shape) for axis in axes if tensor.shape[axis] > 1
    )
    item.outputs = ((*item.outputs[0], *layers),)
    tracer.mark(tensor, Value(layers, value.weight, value.call))
    return layers
