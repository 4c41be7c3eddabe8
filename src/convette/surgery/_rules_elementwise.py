"""Label rules of element-wise functions, reductions and normalisations."""

from typing import Any

import torch
from torch import Tensor

from convette.surgery._calls import tensors_in
from convette.surgery._labels import spread, varying, vector_of
from convette.surgery._records import Call, Layers, Operand
from convette.surgery._tracer import Tracer


def elementwise(tracer: Tracer, call: Call) -> Any:
    """Any function of elements at the same place: its operands' channels are the same."""
    out = call.out if isinstance(call.out, Tensor) else tensors_in(call.out, [])[0]
    tensors = [tensor for tensor in tensors_in([call.args, call.kwargs], []) if tensor.ndim]
    if len(tensors) == 1 and tensors[0].shape == out.shape:
        return tracer.layers(tensors[0])
    return tracer.align([tracer.operand(tensor, out.shape) for tensor in tensors], call.index)


def like_first(tracer: Tracer, call: Call) -> Layers:
    """``zeros_like``, ``dropout``, ``contiguous``...: the labels of the first tensor."""
    return tracer.layers(call.first)


def extremum(tracer: Tracer, call: Call) -> Any:
    """``max``, ``min``: element-wise with two tensors, else a reduction."""
    other = call.argument(1, "other")
    return elementwise(tracer, call) if isinstance(other, Tensor) else reduction(tracer, call)


def reduced_axes(call: Call, position: int = 1) -> list[int]:
    """Return the axes a reduction runs over, counted from the front."""
    dim = call.kwargs.get("axis", call.argument(position, "dim", None))
    ndim = call.first.ndim
    if dim is None or isinstance(dim, torch.dtype | bool) or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [axis % ndim for axis in dims]


def reduction(tracer: Tracer, call: Call) -> Any:
    """``mean``, ``sum``, ``amax``, ``std``, ``norm``...: the reduced axes go, the others stay."""
    position = 2 if call.name in ("norm", "vector_norm", "logsumexp_") else 1
    axes = reduced_axes(call, position)
    layers = tracer.reduced(tracer.layers(call.first), axes, call)
    outs = [call.out] if isinstance(call.out, Tensor) else tensors_in(call.out, [])
    result = []
    for out in outs:
        kept = [axis for axis in range(call.first.ndim) if axis not in axes]
        squeeze = out.ndim != call.first.ndim
        if squeeze and out.ndim != len(kept):
            result.append(())
            continue
        small = [layer.squeeze(axes) if squeeze else layer for layer in layers]
        result.append(tuple(layer.expand(out.shape) for layer in small if varying(layer)))
    return result


def argument_of(tracer: Tracer, call: Call) -> Any:
    """``argmax``, ``topk``, ``sort``, ``cumsum``: positions along an axis, which therefore stays as it is."""
    axis_position = 2 if call.name == "topk" else 1
    axes = reduced_axes(call, axis_position) if call.name != "topk" or call.argument(2, "dim") is not None else [-1]
    axes = [axis % call.first.ndim for axis in axes]
    if call.name in ("sort", "argsort", "topk") and call.argument(axis_position, "dim", None) is None:
        axes = [call.first.ndim - 1]
    for layer in tracer.layers(call.first):
        if set(axes) & set(varying(layer)):
            tracer.freeze(call)
            return ()
    if isinstance(call.out, Tensor) and call.out.shape == call.first.shape:
        return tracer.layers(call.first)
    return reduction(tracer, call) if call.name in ("argmax", "argmin") else _cut(tracer, call, axes)


def _cut(tracer: Tracer, call: Call, axes: list[int]) -> Any:
    return [
        tuple(
            layer[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(layer.ndim))].expand(out.shape)
            for layer in tracer.layers(call.first)
        )
        for out in tensors_in(call.out, [])
    ]


def softmax(tracer: Tracer, call: Call) -> Layers:
    """``softmax`` and kin: what is weighed against each other goes together or not at all."""
    axis = call.argument(1, "dim", None)
    axis = -1 if axis is None else axis
    return _tied(tracer, call, [axis % call.first.ndim])


def _tied(tracer: Tracer, call: Call, axes: list[int]) -> Layers:
    return tuple(
        tracer.store.unite_along(layer, [axis for axis in axes if axis in varying(layer)], call.index)
        for layer in tracer.layers(call.first)
    )


def vector_normalize(tracer: Tracer, call: Call) -> Layers:
    """``F.normalize``, ``cosine_similarity``-like: a norm over an axis."""
    axis = call.argument(2, "dim", 1) % call.first.ndim
    layers = tracer.layers(call.first)
    _scope_over(tracer, call, layers, [axis])
    return layers


def _scope_over(tracer: Tracer, call: Call, layers: Layers, axes: list[int]) -> None:
    hit = tuple(layer for layer in layers if set(varying(layer)) & set(axes))
    if hit:
        tracer.scope(call, tuple(axes), hit)


def glu(tracer: Tracer, call: Call) -> Layers:
    """``glu``: unit i of the first half goes with unit i of the second."""
    axis = call.argument(1, "dim", -1) % call.first.ndim
    half = call.out.shape[axis]
    operands = []
    for start in (0, half):
        layers = tuple(layer.narrow(axis, start, half) for layer in tracer.layers(call.first))
        operands.append(Operand(tuple(size > 1 for size in call.out.shape), layers))
    return tracer.align(operands, call.index)


def prelu(tracer: Tracer, call: Call) -> Layers:
    """``prelu``: one slope for all or one a channel."""
    weight = call.argument(1, "weight")
    if weight.numel() == 1 or call.first.ndim < 2:
        return tracer.layers(call.first)
    return per_channel(tracer, call, 1, [(weight, "affine")])


def per_channel(tracer: Tracer, call: Call, axis: int, vectors: list[tuple[Tensor | None, str]]) -> Layers:
    """Tie one-dimensional parameters to `axis` of the first tensor; return the layers of the result."""
    layers = tracer.layers(call.first)
    present = [tensor for tensor, _ in vectors if tensor is not None and tensor.numel() > 1]
    own = [layer for layer in layers if axis in varying(layer)]
    if len(own) == 1 and varying(own[0]) == (axis,):
        vector = vector_of(own[0])
        for tensor in present:
            tracer.bind(tensor, 0, vector, "affine", call.index)
        return layers
    if not own and call.first.shape[axis] > 1:
        for tensor in present:
            tracer.bind(tensor, 0, torch.zeros(1, dtype=torch.int64).expand(tensor.shape), "affine", call.index)
        return layers
    shape = call.first.shape
    operands = [tracer.operand(call.first, shape)]
    for tensor in present:
        full = tuple(a == axis for a in range(len(shape)))
        operands.append(Operand(full, tuple(spread(layer, axis, shape) for layer in tracer.layers(tensor))))
    return tracer.align(operands, call.index)


def batch_norm(tracer: Tracer, call: Call) -> Layers:
    """``batch_norm``, ``instance_norm``: statistics and affine are a channel's own."""
    first = call.name == "batch_norm"
    names = ["running_mean", "running_var", "weight", "bias"]
    vectors = [(call.argument(k + 1, name), "affine") for k, name in enumerate(names)]
    layers = per_channel(tracer, call, 1, vectors)
    training = call.argument(5, "training" if first else "use_input_stats", False)
    if training:
        axes = [axis for axis in range(call.first.ndim) if axis != 1 and (axis > 0 or first)]
        _scope_over(tracer, call, tracer.layers(call.first), axes)
    return layers


def layer_norm(tracer: Tracer, call: Call) -> Layers:
    """``layer_norm``, ``rms_norm``: affine per channel, statistics over channels."""
    sizes = list(call.argument(1, "normalized_shape"))
    shape = call.first.shape
    axes = list(range(len(shape) - len(sizes), len(shape)))
    layers = tracer.layers(call.first)
    affine = [call.argument(2, "weight"), call.argument(3, "bias") if call.name == "layer_norm" else None]
    if len(axes) == 1:
        result = per_channel(tracer, call, axes[0], [(tensor, "affine") for tensor in affine])
    else:
        operands = [tracer.operand(call.first, shape)]
        operands += [tracer.operand(tensor, shape) for tensor in affine if tensor is not None]
        result = tracer.align(operands, call.index)
    _scope_over(tracer, call, layers, axes)
    tracer.sized(call, "normalized_shape", (), [result], axes[0], sizes)
    return result


def group_norm(tracer: Tracer, call: Call) -> Layers:
    """``group_norm``: whole groups go where that leaves more choice (exact), else the same place in every group."""
    groups, channels = int(call.argument(1, "num_groups")), call.first.shape[1]
    vectors = [(call.argument(2, "weight"), "affine"), (call.argument(3, "bias"), "affine")]
    layers = per_channel(tracer, call, 1, vectors)
    for layer in tracer.layers(call.first):
        if 1 not in varying(layer):
            continue
        if groups > 1:
            parts = layer.narrow(0, 0, 1)[0].unflatten(0, (groups, channels // groups))
            whole = groups >= channels // groups
            tracer.store.unite_along(parts, [1 if whole else 0], call.index)
            if whole:
                vector = layer[tuple(slice(None) if a == 1 else 0 for a in range(layer.ndim))]
                tracer.sized(call, "groups", (layer,), [layers], 1, (groups, vector[:: channels // groups]))
        if groups == 1 or not whole:
            axes = [axis for axis in range(call.first.ndim) if axis != 0]
            _scope_over(tracer, call, (layer,), axes)
    return layers
