"""Label rules of the functions that only move data: the same function is carried out on the labels."""

from typing import Any

import torch
from torch import Tensor

from convette.surgery._labels import moved, normalised, reshaped, varying
from convette.surgery._records import Call, Layers
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
