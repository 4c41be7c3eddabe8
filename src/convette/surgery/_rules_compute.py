"""Label rules of the functions that mix channels: convolutions, products, attention, pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convette.surgery._labels import normalised, spread, varying
from convette.surgery._records import Call, Layers, Operand
from convette.surgery._tracer import Tracer


def _zeros(size: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int64).expand(size)


def _input_channels(tracer: Tracer, call: Call, tensor: Tensor, axis: int) -> tuple[Tensor | None, list[Tensor]]:
    """Return the labels of the channels a convolution or linear map reads, and the layers that pass it by (batch)."""
    spatial = range(axis + 1, tensor.ndim)
    passing = []
    for layer in tracer.layers(tensor):
        axes = varying(layer)
        if axis in axes:
            continue
        if any(other in spatial for other in axes):
            tracer.store.freeze(layer, call.index)
        else:
            passing.append(layer)
    return tracer.axis_vector(tensor, axis, call.index), passing


def _result(call: Call, labels: Tensor, axis: int, passing: list[Tensor]) -> Layers:
    shape = call.out.shape
    layers = [spread(labels, axis, shape)] if len(labels) > 1 else []
    for layer in passing:
        small = layer[tuple(slice(None) if a in varying(layer) else slice(0, 1) for a in range(layer.ndim))]
        layers.append(small.expand(shape))
    return tuple(layers)


def _weight_rows(tracer: Tracer, call: Call, weight: Tensor, dim: int) -> Tensor:
    """Return the labels a weight gives to what it produces."""
    if tracer.is_parameter(weight):
        return tracer.own(weight, dim, "producer")
    vector = tracer.axis_vector(weight, dim, call.index)
    if vector is None:
        return _zeros(weight.shape[dim])
    tracer.note_role(vector, "producer")
    return vector


def _bind_rows(tracer: Tracer, call: Call, weight: Tensor, dim: int, labels: Tensor) -> None:
    tracer.bind(weight, dim, labels, "producer", call.index)


def _freeze_kernel(tracer: Tracer, call: Call, weight: Tensor) -> None:
    if tracer.is_parameter(weight):
        return
    # Reshaped for its statistics and back, a layer may be stored along axes on which it is constant.
    value = tracer.value(weight)
    tracer.mark(weight, value._replace(layers=tuple(normalised(layer) for layer in value.layers)))
    for layer in tracer.layers(weight):
        if any(axis >= 2 for axis in varying(layer)):
            tracer.store.freeze(layer, call.index)


def convolution(tracer: Tracer, call: Call) -> Layers:
    """Convolutions, plain and transposed, of any number of dimensions and groups."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    groups = int(call.argument(6, "groups", 1))
    transposed = "transpose" in call.name
    axis = call.first.ndim - (weight.ndim - 2) - 1
    labels, passing = _input_channels(tracer, call, call.first, axis)
    _freeze_kernel(tracer, call, weight)
    if groups == 1:
        into, out_of = (0, 1) if transposed else (1, 0)
        given = _zeros(weight.shape[into]) if labels is None else labels
        tracer.bind(weight, into, given, "consumer", call.index)
        rows = _weight_rows(tracer, call, weight, out_of)
    else:
        rows = _grouped(tracer, call, weight, labels, groups, transposed)
    if bias is not None:
        tracer.bind(bias, 0, rows, "producer", call.index)
    return _result(call, rows, axis, passing)


def _grouped(
    tracer: Tracer, call: Call, weight: Tensor, labels: Tensor | None, groups: int, transposed: bool
) -> Tensor:
    """Labels through a grouped convolution: whole groups go, or the same place in every group."""
    inside = (weight.shape[0] // groups) if transposed else weight.shape[1]
    outside = weight.shape[1] if transposed else (weight.shape[0] // groups)
    whole = labels is not None and (inside == 1 or groups >= max(inside, outside))
    if whole and labels is not None:
        parts = labels.reshape(groups, inside)
        if inside > 1:
            tracer.store.unite_along(parts, [1], call.index)
        heads = parts[:, 0]
        rows = heads.repeat_interleave(outside)
        long = parts.reshape(-1) if transposed else rows
        tracer.bind(weight, 0, long, "producer", call.index)
        if weight.shape[1] > 1 and not tracer.is_parameter(weight):
            tracer.bind(weight, 1, _zeros(weight.shape[1]), "consumer", call.index)
        tracer.sized(call, "groups", (), [], axis=-1, given=(groups, heads))
        return rows
    # The same place in every group.
    place = _zeros(inside)
    if labels is not None:
        parts = labels.reshape(groups, inside)
        place = tracer.store.unite_along(parts, [0], call.index)[0]
    if transposed:
        tracer.bind(weight, 0, place.repeat(groups), "consumer", call.index)
        return _weight_rows(tracer, call, weight, 1).repeat(groups)
    tracer.bind(weight, 1, place, "consumer", call.index)
    if tracer.is_parameter(weight) and (tracer.parameters[id(weight)], 0) not in tracer.store.slots:
        rows = tracer.store.fresh(outside).repeat(groups)
        _bind_rows(tracer, call, weight, 0, rows)
        return rows
    rows = _weight_rows(tracer, call, weight, 0)
    return tracer.store.unite_along(rows.reshape(groups, outside), [0], call.index).reshape(-1)


def linear(tracer: Tracer, call: Call) -> Layers:
    """``linear``: the last axis is read, the others pass."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    axis = call.first.ndim - 1
    labels, passing = _input_channels(tracer, call, call.first, axis)
    if weight.ndim == 1:
        tracer.freeze(call)
        return ()
    tracer.bind(weight, 1, _zeros(weight.shape[1]) if labels is None else labels, "consumer", call.index)
    rows = _weight_rows(tracer, call, weight, 0)
    if bias is not None:
        tracer.bind(bias, 0, rows, "producer", call.index)
    return _result(call, rows, axis, passing)


def embedding(tracer: Tracer, call: Call) -> Layers:
    """``embedding``: rows are words and stay, columns are channels."""
    weight = call.argument(1, "weight")
    if not tracer.is_parameter(weight):
        tracer.freeze(call)
        return ()
    return (spread(tracer.own(weight, 1, "producer"), call.out.ndim - 1, call.out.shape),)


def contraction(
    tracer: Tracer, call: Call, tensors: Sequence[tuple[Any, str]], result: str, scoped: bool = True
) -> Layers:
    """Labels of a product of `tensors`, each given with one letter an axis, summed over letters not in `result`.

    The first item of a pair is a tensor, or its shape and layers.
    """
    given = [
        (item.shape, tracer.layers(item), letters) if isinstance(item, Tensor) else (*item, letters)
        for item, letters in tensors
    ]
    letters = sorted({letter for _, _, names in given for letter in names})
    size = dict.fromkeys(letters, 1)
    for shape, _, names in given:
        for letter, length in zip(names, shape, strict=True):
            size[letter] = max(size[letter], length)
    space = [size[letter] for letter in letters]
    operands = []
    for shape, layers, names in given:
        has = dict(zip(names, shape, strict=True))
        order = sorted(range(len(names)), key=lambda axis: names[axis])
        index = tuple(slice(None) if letter in has else None for letter in letters)
        spreads = tuple(layer.permute(order)[index].expand(space) for layer in layers)
        operands.append(Operand(tuple(has.get(letter, 1) > 1 for letter in letters), spreads))
    merged = tracer.align(operands, call.index)
    gone = [axis for axis, letter in enumerate(letters) if letter not in result]
    reduced = tracer.reduced(merged, gone, call, scoped)
    order = [letters.index(letter) for letter in result]
    others = [axis for axis in range(len(letters)) if axis not in order]
    return tuple(_pick(layer, others, order) for layer in reduced)


def _pick(layer: Tensor, others: list[int], order: list[int]) -> Tensor:
    out = layer.permute([*others, *order])
    for _ in others:
        out = out.select(0, 0)
    return out


def _any_weight(tracer: Tracer, tensors: Sequence[Tensor]) -> bool:
    return any(tracer.value(tensor).weight for tensor in tensors)


_BATCH = "ABCDEFGHIJ"


def _spread_out(layers: Layers, shape: Sequence[int]) -> Layers:
    return tuple(layer.expand(*shape) for layer in layers if varying(layer))


def matmul(tracer: Tracer, call: Call) -> Layers:
    """``matmul``, ``bmm``, ``mm``, ``@``: a product over the inner axis."""
    left, right = call.args[0], call.argument(1, "other", call.kwargs.get("mat2"))
    if call.name == "__rmatmul__":
        left, right = right, left
    return _product(tracer, call, left, right)


def _product(tracer: Tracer, call: Call, left: Tensor, right: Tensor) -> Layers:
    names_left = _BATCH[: max(left.ndim - 2, 0)][::-1] + ("mk" if left.ndim > 1 else "k")
    names_right = _BATCH[: max(right.ndim - 2, 0)][::-1] + ("kn" if right.ndim > 1 else "k")
    batch = max(left.ndim, right.ndim, 2) - 2
    result = _BATCH[:batch][::-1] + ("m" if left.ndim > 1 else "") + ("n" if right.ndim > 1 else "")
    for tensor, dim in ((left, left.ndim - 1), (right, max(right.ndim - 2, 0))):
        if tracer.is_parameter(tensor) and tensor.shape[dim] > 1:
            tracer.own(tensor, dim, "consumer")
    scoped = not _any_weight(tracer, [left, right])
    return _spread_out(
        contraction(tracer, call, [(left, names_left), (right, names_right)], result, scoped), call.out.shape
    )


def addmm(tracer: Tracer, call: Call) -> Layers:
    """``addmm``, ``baddbmm``: a product and what is added to it."""
    layers = _product(tracer, call, call.argument(1, "mat1"), call.argument(2, "mat2"))
    shape = call.out.shape
    product = Operand(tuple(size > 1 for size in shape), layers)
    return tracer.align([product, tracer.operand(call.first, shape)], call.index)


def einsum(tracer: Tracer, call: Call) -> Layers:
    """``einsum`` in its text form."""
    text = call.args[0]
    tensors = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], list | tuple) else call.args[1:]
    if not isinstance(text, str) or "." in text:
        tracer.freeze(call)
        return ()
    left, arrow, result = text.replace(" ", "").partition("->")
    names = left.split(",")
    if not arrow:
        once = "".join(names)
        result = "".join(sorted(letter for letter in set(once) if once.count(letter) == 1))
    if any(len(set(name)) != len(name) for name in names):
        tracer.freeze(call)
        return ()
    scoped = not _any_weight(tracer, tensors)
    return _spread_out(
        contraction(tracer, call, list(zip(tensors, names, strict=True)), result, scoped), call.out.shape
    )


def attention(tracer: Tracer, call: Call) -> Layers:
    """``scaled_dot_product_attention``: whole heads; query and key dimensions go together."""
    query, key, value = (call.argument(k, name) for k, name in enumerate(("query", "key", "value")))
    mask = call.argument(3, "attn_mask")
    heads = query.shape[-3] if query.ndim > 3 else 1
    sides = []
    for tensor in (key, value):
        layers, shape = tracer.layers(tensor), tensor.shape
        if tensor.ndim > 3 and 1 < tensor.shape[-3] < heads:
            times = heads // tensor.shape[-3]
            layers = tuple(layer.repeat_interleave(times, dim=-3) for layer in layers)
            shape = torch.Size([*shape[:-3], heads, *shape[-2:]])
        sides.append((shape, layers))
    batch = _BATCH[: query.ndim - 2][::-1]
    scores = contraction(
        tracer, call, [((query.shape, tracer.layers(query)), batch + "le"), (sides[0], batch + "se")], batch + "ls"
    )
    shape = torch.Size([*call.out.shape[:-2], query.shape[-2], key.shape[-2]])
    scores = _spread_out(scores, shape)
    if isinstance(mask, Tensor):
        whole = Operand(tuple(size > 1 for size in shape), scores)
        scores = tracer.align([whole, tracer.operand(mask, shape)], call.index)
    last = len(shape) - 1
    scores = tuple(
        tracer.store.unite_along(layer, [last] if last in varying(layer) else [], call.index) for layer in scores
    )
    out = contraction(tracer, call, [((shape, scores), batch + "ls"), (sides[1], batch + "sv")], batch + "lv")
    return _spread_out(out, call.out.shape)


def multi_head_attention(tracer: Tracer, call: Call) -> Any:
    """``nn.MultiheadAttention``: whole heads inside, any channels outside."""
    query, key, value = (call.argument(k, name) for k, name in enumerate(("query", "key", "value")))
    heads = int(call.argument(4, "num_heads"))
    packed, packed_bias = call.argument(5, "in_proj_weight"), call.argument(6, "in_proj_bias")
    out_weight, out_bias = call.argument(11, "out_proj_weight"), call.argument(12, "out_proj_bias")
    extra = [call.argument(7, "bias_k"), call.argument(8, "bias_v")]
    if any(tensor is not None for tensor in extra) or call.argument(9, "add_zero_attn", False):
        tracer.freeze(call)
        return ()
    embed = out_weight.shape[1]
    rows = tracer.store.fresh(heads).repeat_interleave(embed // heads) if heads > 1 else _zeros(embed)
    separate: list[Any] = [call.kwargs.get(f"{name}_proj_weight") for name in "qkv"]
    weights = separate if packed is None else [packed] * 3
    for tensor, weight in zip((query, key, value), weights, strict=True):
        labels, _ = _input_channels(tracer, call, tensor, tensor.ndim - 1)
        tracer.bind(weight, 1, _zeros(weight.shape[1]) if labels is None else labels, "consumer", call.index)
    for weight in [packed] if packed is not None else separate:
        tracer.bind(weight, 0, rows.repeat(weight.shape[0] // embed), "producer", call.index)
    if packed_bias is not None:
        tracer.bind(packed_bias, 0, rows.repeat(3), "producer", call.index)
    tracer.bind(out_weight, 1, rows, "consumer", call.index)
    outputs = _weight_rows(tracer, call, out_weight, 0)
    if out_bias is not None:
        tracer.bind(out_bias, 0, outputs, "producer", call.index)
    if heads > 1:
        tracer.records.heads[call.module] = (heads, rows[:: embed // heads])
    out = call.out[0]
    layers = (spread(outputs, out.ndim - 1, out.shape),)
    return [layers, *[()] * (sum(item is not None for item in call.out) - 1)]


def spatial(tracer: Tracer, call: Call) -> Any:
    """Pooling, interpolation and other maps over rows and columns: channels pass."""
    digits = [int(c) for c in call.name if c in "123"]
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    axes = range(call.first.ndim - (digits[-1] if digits else call.first.ndim - 2), call.first.ndim)
    layers = []
    for layer in tracer.layers(call.first):
        if set(varying(layer)) <= set(axes):
            # Places, not channels: a table of positions that is resized stays as it is.
            tracer.store.freeze(layer, call.index)
            if varying(layer) and not tracer.value(call.first).weight:
                tracer.report(call)
            continue
        # A channel's rows and columns are mixed: they are one channel's or nobody's.
        layer = tracer.store.unite_along(layer, [axis for axis in varying(layer) if axis in axes], call.index)
        index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(layer.ndim))
        layers.append(layer[index])
    return [tuple(layer.expand(out.shape) for layer in layers) for out in outs]


def grid_sample(tracer: Tracer, call: Call) -> Layers:
    """``grid_sample``: the grid holds places, not channels."""
    for layer in tracer.layers(call.argument(1, "grid")):
        tracer.store.freeze(layer, call.index)
    return spatial(tracer, call)[0]


def roi_align(tracer: Tracer, call: Call) -> Layers:
    """torchvision's region pooling: channels pass, regions are places."""
    result = []
    for layer in tracer.layers(call.first):
        if varying(layer) != (1,):
            tracer.freeze(call)
            return ()
        result.append(layer[:1, :, :1, :1].expand(call.out.shape))
    return tuple(result)
