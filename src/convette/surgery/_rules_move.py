"""Label rules of the functions that only move data: the same function is carried out on the labels."""

from typing import Any

import torch
from torch import Tensor

from convette.surgery._labels import inhabited, moved, normalised, reshaped, spread, varying, vector_of
from convette.surgery._records import Call, Fixed, Layers, Operand, Value
from convette.surgery._tracer import Tracer


def _with_boxes(tracer: Tracer, call: Call, layers: Layers) -> Layers:
    # A layer that varies along several axes must in the end keep a rectangle: see `_solve`.
    for layer in layers:
        if len(varying(layer)) > 1:
            tracer.records.boxes.append((layer, call.index))
    return layers


def _clean(layer: Tensor, source: Tensor) -> Tensor:
    # A view of an expanded tensor keeps its zero strides; a copy has lost them.
    same = layer.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return layer if same else normalised(layer)


def same_function(tracer: Tracer, call: Call) -> Any:
    """Permutations, new axes, repeats and the like: run the function on every layer."""
    outs = [call.on(layer) for layer in tracer.layers(call.first)]
    if isinstance(call.out, Tensor):
        return _with_boxes(tracer, call, tuple(_clean(out, call_in) for out, call_in in _zip(tracer, call, outs)))
    pieces = range(len(call.out))
    return [
        _with_boxes(tracer, call, tuple(_clean(out[k], call_in) for out, call_in in _zip(tracer, call, outs)))
        for k in pieces
    ]


def _zip(tracer: Tracer, call: Call, outs: list[Any]) -> Any:
    return zip(outs, tracer.layers(call.first), strict=True)


def repeat(tracer: Tracer, call: Call) -> Layers:
    """``repeat``, ``tile``: as `same_function`; the counts may be sizes."""
    layers = same_function(tracer, call)
    tracer.sized(call, "shape", (), [layers])
    return layers


def reshape(tracer: Tracer, call: Call) -> Layers:
    """``view``, ``reshape``, ``flatten``, ``squeeze``...: the labels read in the same order."""
    if isinstance(call.argument(1, "dtype"), torch.dtype):
        tracer.freeze(call)
        return ()
    shape = call.out.shape
    inputs = tracer.layers(call.first)
    layers = tuple(out for out in (reshaped(layer, shape) for layer in inputs) if varying(out))
    if call.name not in ("flatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"):
        tracer.sized(call, "shape", inputs, [layers])
    return _with_boxes(tracer, call, layers)


def expand(tracer: Tracer, call: Call) -> Layers:
    """``expand``, ``broadcast_to``: labels follow, sizes are noted."""
    layers = tuple(layer.expand(call.out.shape) for layer in tracer.layers(call.first))
    if call.name != "expand_as":
        tracer.sized(call, "shape", (), [layers])
    return layers


def broadcast_tensors(tracer: Tracer, call: Call) -> Any:
    """Every tensor is spread over the common shape."""
    sources = call.args[0] if isinstance(call.args[0], list | tuple) else call.args
    return [
        tuple(layer.expand(out.shape) for layer in tracer.layers(source))
        for source, out in zip(sources, call.out, strict=True)
    ]


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


def flip(tracer: Tracer, call: Call) -> Layers:
    """``flip``, ``rot90``: moved as the data are."""
    every = tuple(range(call.first.ndim))
    return tuple(moved(layer, call.out.shape, every, call.on) for layer in tracer.layers(call.first))


def roll(tracer: Tracer, call: Call) -> Layers:
    """``roll``: a shift along a labelled axis is noted, for its length is a number of channels."""
    dims = call.argument(2, "dims", None)
    inputs = tracer.layers(call.first)
    if dims is None:
        tracer.freeze(call)
        return ()
    dims = [dim % call.first.ndim for dim in ([dims] if isinstance(dims, int) else dims)]
    shifts = call.argument(1, "shifts")
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    result = []
    for layer in inputs:
        hit = [(dim, shift) for dim, shift in zip(dims, shifts, strict=True) if dim in varying(layer)]
        if hit:
            result.append(torch.roll(layer, [shift for _, shift in hit], [dim for dim, _ in hit]))
            tracer.sized(call, "roll", inputs, [], hit[0][0], hit)
        else:
            result.append(layer)
    return tuple(result)


def pad(tracer: Tracer, call: Call) -> Layers:
    """``pad``: new positions along a labelled axis are channels of their own, which may go with what they meet."""
    amounts = list(call.argument(1, "pad"))
    mode, ndim = call.argument(2, "mode", "constant"), call.first.ndim
    axes = {ndim - 1 - k // 2: (amounts[k], amounts[k + 1]) for k in range(0, len(amounts), 2)}
    axes = {axis: amount for axis, amount in axes.items() if amount != (0, 0)}
    inputs = tracer.layers(call.first)
    hit = {axis for layer in inputs for axis in varying(layer) if axis in axes}
    if hit and mode != "constant":
        tracer.freeze(call)
        return ()
    result = []
    for layer in inputs:
        present = [axis for axis in varying(layer) if axis in axes]
        if present:
            # The new positions are nobody's along the other axes, so the old ones must be one there as well.
            others = [axis for axis in varying(layer) if axis != present[0]]
            layer, present = tracer.store.unite_along(layer, others, call.index), present[:1]
        index = tuple(
            slice(0, 1) if axis in axes and axis not in present else slice(None) for axis in range(layer.ndim)
        )
        out = layer[index]
        for axis in present:
            out = _padded(tracer, out, axis, axes[axis])
        result.append(out.expand(call.out.shape))
    if hit:
        tracer.sized(call, "pad", inputs, [tuple(result)], 0, [(axis, *axes[axis]) for axis in sorted(hit)])
    return tuple(result)


def _padded(tracer: Tracer, layer: Tensor, axis: int, amount: tuple[int, int]) -> Tensor:
    before, after = amount
    cut = layer.narrow(axis, max(-before, 0), layer.shape[axis] - max(-before, 0) - max(-after, 0))
    parts = []
    for size in (before, after):
        shape = [1 if a != axis else max(size, 0) for a in range(layer.ndim)]
        fresh = tracer.store.fresh(max(size, 0)).view(shape)
        parts.append(fresh.expand([n if a != axis else max(size, 0) for a, n in enumerate(cut.shape)]))
    vector = torch.cat([parts[0], cut, parts[1]], axis)
    return normalised(vector)


def created(tracer: Tracer, call: Call) -> Layers:
    """``zeros``, ``ones``, ``full``, ``empty``: nobody's channels yet; the tensor takes those it meets first."""
    tracer.sized(call, "shape", (), [()])
    tracer.records.blanks[call.index] = tracer.records.sizes[-1]
    return ()


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


def pixel_shuffle(tracer: Tracer, call: Call) -> Layers:
    """``pixel_shuffle``: the channels that become one channel's pixels go together."""
    channels = call.out.shape[-3]
    result = []
    for layer in tracer.layers(call.first):
        if {layer.ndim - 1, layer.ndim - 2} & set(varying(layer)):
            tracer.freeze(call)
            return ()
        rows = layer[..., 0, 0].unflatten(-1, (channels, -1))
        tied = tracer.store.unite_along(rows, [rows.ndim - 1], call.index)
        result.append(tied[..., 0][..., None, None].expand(call.out.shape))
    return tuple(layer for layer in result if varying(layer))


def pixel_unshuffle(tracer: Tracer, call: Call) -> Layers:
    """``pixel_unshuffle``: each channel becomes several."""
    times = call.out.shape[-3] // call.first.shape[-3]
    result = []
    for layer in tracer.layers(call.first):
        if {layer.ndim - 1, layer.ndim - 2} & set(varying(layer)):
            tracer.freeze(call)
            return ()
        result.append(layer[..., :1, :1].repeat_interleave(times, dim=-3).expand(call.out.shape))
    return tuple(normalised(layer) for layer in result)


def im2col(tracer: Tracer, call: Call) -> Layers:
    """``F.unfold``: each channel becomes kernel-size many rows."""
    rows = call.out.shape[-2] // call.first.shape[-3]
    result = []
    for layer in tracer.layers(call.first):
        if {layer.ndim - 1, layer.ndim - 2} & set(varying(layer)):
            tracer.store.freeze(layer, call.index)
            continue
        channels = layer[..., :1, 0].repeat_interleave(rows, dim=-2)
        result.append(normalised(channels).expand(call.out.shape))
    return tuple(result)


def col2im(tracer: Tracer, call: Call) -> Layers:
    """``F.fold``: the rows of one channel come together again."""
    channels = call.out.shape[-3]
    result = []
    for layer in tracer.layers(call.first):
        if layer.ndim - 1 in varying(layer):
            tracer.store.freeze(layer, call.index)
            continue
        rows = layer.narrow(-1, 0, 1).unflatten(-2, (channels, -1))
        tied = tracer.store.unite_along(rows, [rows.ndim - 2], call.index)
        result.append(tied[..., 0, :].unsqueeze(-1).expand(call.out.shape))
    return tuple(result)


def meshgrid(tracer: Tracer, call: Call) -> Any:
    """Coordinates: never channels."""
    tracer.freeze(call)
    return ()
