"""What an operator of the dispatcher costs in multiply-accumulates: one formula an operator, keyed by its name.

A formula gets the operator's arguments by name and its output, and returns one `Term` for every product it does, so
that a fused operator (an encoder layer) is told apart into its linears and its attention.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CONVOLUTION, LINEAR, MATMUL, ATTENTION = "convolution", "linear", "matmul", "attention"
FAMILIES = (CONVOLUTION, LINEAR, MATMUL, ATTENTION)
NORM = "norm"


@dataclass(frozen=True)
class Term:
    """One product inside an operator, or one normalisation (no `sizes`): the sizes multiply to the MACs.

    `candidates` are the operands that may turn out to be a parameter (which makes a matrix product a linear map);
    `owner` is a parameter whose module the term belongs to although it is no operand of it.
    """

    family: str
    sizes: tuple[int, ...] = (0,)
    candidates: tuple[Tensor, ...] = ()
    bias: int = 0
    norm: int = 0
    shape: tuple[int, ...] = ()
    owner: Tensor | None = None


Arguments = Mapping[str, Any]
Formula = Callable[[Arguments, Any], list[Term]]


def elements(x: Tensor) -> int:
    """Number of elements; the strided nested tensors of the transformer fast path have no shape to ask."""
    return x.numel()


def rows(x: Tensor, width: int) -> int:
    """Number of vectors of `width` entries in `x`."""
    return elements(x) // width if width else 0


def sequence_lengths(x: Tensor) -> list[int]:
    """Tokens of each sequence of a batch ``(n, tokens, width)``, padded or nested."""
    if x.is_nested:
        return [int(n) for n in x._nested_tensor_size()[:, 0].tolist()]
    return [x.shape[1]] * x.shape[0]


def shape_of(x: Tensor) -> tuple[int, ...]:
    return () if x.is_nested else tuple(x.shape)


def _convolution(a: Arguments, out: Any) -> list[Term]:
    x, weight = a["input"] if "input" in a else a["self"], a["weight"]
    # A transposed convolution spreads each input element over the kernel; a plain one gathers for each output element.
    anchor = x if a.get("transposed") else out
    places = elements(anchor) // anchor.shape[1 - weight.dim()]
    sizes = (places, *weight.shape)
    bias = elements(out) if a.get("bias") is not None else 0
    return [Term(CONVOLUTION, sizes, (weight,), bias=bias, shape=shape_of(out))]


def _convolution_tbc(a: Arguments, out: Any) -> list[Term]:
    weight = a["weight"]  # kernel, in, out
    return [
        Term(
            CONVOLUTION,
            (out.shape[0] * out.shape[1], *weight.shape),
            (weight,),
            bias=elements(out),
            shape=shape_of(out),
        )
    ]


def _deformable_convolution(a: Arguments, out: Any) -> list[Term]:
    weight = a["weight"]
    places = out.shape[0] * math.prod(out.shape[2:])
    return [Term(CONVOLUTION, (places, *weight.shape), (weight,), bias=elements(out), shape=shape_of(out))]


def _linear(a: Arguments, out: Any) -> list[Term]:
    x, weight = a["input"] if "input" in a else a["self"], a["weight"]
    bias = elements(out) if a.get("bias") is not None else 0
    return [Term(LINEAR, (rows(x, weight.shape[-1]), *weight.shape), (weight,), bias=bias, shape=shape_of(out))]


def _product(first: str, second: str, added: str | None = None) -> Formula:
    """Matrix product of two operands named `first` and `second`, plus `added`: (batch, m, k) x (batch, k, n)."""

    def formula(a: Arguments, out: Any) -> list[Term]:
        left, right = a[first], a[second]
        vector = right.dim() == 1
        batch = left.shape[0] if left.dim() == 3 else 1
        m = left.shape[-2] if left.dim() > 1 else 1
        sizes = (batch, m, left.shape[-1], 1 if vector else right.shape[-1])
        bias = elements(out) if added and a.get("beta", 1) != 0 else 0
        return [Term(MATMUL, sizes, (right, left), bias=bias, shape=shape_of(out))]

    return formula


def _bilinear(a: Arguments, out: Any) -> list[Term]:
    left, weight, right = a["i1"], a["i2"], a["i3"]
    expanded = [a["expand1"], a["expand2"], a["expand3"]]
    dims = left.dim() + len(expanded[0])
    size = [1] * dims
    for x, new in zip((left, weight, right), expanded, strict=True):
        shape = iter(x.shape)
        for dim in range(dims):
            if dim not in new:
                size[dim] = max(size[dim], next(shape))
    return [Term(LINEAR, tuple(size), (weight,), shape=shape_of(out))]


def _attention_products(query: int, key: int, heads: int, width: int, value_width: int) -> list[Term]:
    # Sizes in the order of a batched matrix product, which attention is where no fused operator takes the widths.
    return [
        Term(ATTENTION, (heads, query, width, key)),
        Term(ATTENTION, (heads, query, key, value_width)),
    ]


def _fused_attention(a: Arguments, out: Any) -> list[Term]:
    """Scaled dot product on ``(..., heads, tokens, width)``: query x key, then weights x value; masked places count."""
    query, key, value = a["query"], a["key"], a["value"]
    if query.is_nested:
        return _nested_attention(query, key, value)
    leading = math.prod(query.shape[:-2])
    return _attention_products(query.shape[-2], key.shape[-2], leading, query.shape[-1], value.shape[-1])


def _nested_attention(query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
    terms = []
    sizes = [x._nested_tensor_size().tolist() for x in (query, key, value)]  # n rows of heads, tokens, width
    for (heads, tokens, width), (_, others, _), (_, _, value_width) in zip(*sizes, strict=True):
        terms += _attention_products(tokens, others, heads, width, value_width)
    return terms


def _ragged_attention(a: Arguments, out: Any) -> list[Term]:
    """Attention on ``(n, tokens, heads, width)``, or on packed sequences that start at given places."""
    query, key, value = a["query"], a["key"], a["value"]
    starts = [a[q] for q in ("cum_seq_q", "cu_seqlens_q") if a.get(q) is not None]
    other = [a[k] for k in ("cum_seq_k", "cu_seqlens_k") if a.get(k) is not None]
    heads, width, value_width = query.shape[-2], query.shape[-1], value.shape[-1]
    if not starts:
        return _attention_products(query.shape[-3], key.shape[-3], query.shape[0] * heads, width, value_width)
    pairs = sum(int(q) * int(k) for q, k in zip(starts[0].diff().tolist(), other[0].diff().tolist(), strict=True))
    return _attention_products(1, pairs, heads, width, value_width)


def _self_attention(
    source: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor,
    qkv_bias: Any,
    projection: Tensor,
    projection_bias: Any,
    heads: int,
) -> list[Term]:
    """The fast path of nn.MultiheadAttention: three input maps, attention, output map."""
    width = projection.shape[-1]
    query, key, _ = source
    tokens = sum(rows(x, width) for x in source)
    terms = [Term(LINEAR, (tokens, width, width), (qkv,), bias=tokens * width if qkv_bias is not None else 0)]
    for q, k in zip(sequence_lengths(query), sequence_lengths(key), strict=True):
        for term in _attention_products(q, k, heads, width // heads, width // heads):
            terms.append(Term(ATTENTION, term.sizes, owner=qkv))
    bias = elements(query) if projection_bias is not None else 0
    terms.append(Term(LINEAR, (rows(query, width), *projection.shape), (projection,), bias=bias, shape=shape_of(query)))
    return terms


def _multi_head_attention(a: Arguments, out: Any) -> list[Term]:
    source = (a["query"], a["key"], a["value"])
    return _self_attention(source, a["qkv_weight"], a["qkv_bias"], a["proj_weight"], a["proj_bias"], a["num_head"])


def _encoder_layer(a: Arguments, out: Any) -> list[Term]:
    x = a["src"]
    terms = _self_attention((x, x, x), a["qkv_weight"], a["qkv_bias"], a["proj_weight"], a["proj_bias"], a["num_heads"])
    for number in (1, 2):
        weight, bias = a[f"ffn_weight_{number}"], a[f"ffn_bias_{number}"]
        tokens = rows(x, a["embed_dim"])
        terms.append(
            Term(LINEAR, (tokens, *weight.shape), (weight,), bias=tokens * weight.shape[0] if bias is not None else 0)
        )
        norm = a[f"norm_weight_{number}"]
        terms.append(Term(NORM, norm=elements(x), owner=norm))
    return terms


def _mkldnn_rnn(a: Arguments, out: Any) -> list[Term]:
    steps = rows(a["input"], a["input"].shape[-1])
    return [
        Term(LINEAR, (steps, *weight.shape), (weight,), bias=steps * weight.shape[0] if a["has_biases"] else 0)
        for weight in (a["weight0"], a["weight1"])
    ]


def _fused_rnn(a: Arguments, out: Any) -> list[Term]:
    steps = rows(a["input"], a["input"].shape[-1])
    terms = []
    for weight in a["weight"]:
        if weight.dim() == 2:
            terms.append(Term(LINEAR, (steps, *weight.shape), (weight,)))
        else:
            terms.append(Term(LINEAR, bias=steps * weight.numel(), owner=weight))
    return terms


def _normalization(a: Arguments, out: Any) -> list[Term]:
    result = out[0] if isinstance(out, (tuple, list)) else out
    return [Term(NORM, norm=elements(result), owner=a.get("weight"), shape=shape_of(result))]


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(
        (
            "aten::convolution",
            "aten::_convolution",
            "aten::convolution_overrideable",
            "aten::cudnn_convolution",
            "aten::cudnn_convolution_relu",
            "aten::miopen_convolution",
            "aten::mkldnn_convolution",
            "aten::_slow_conv2d_forward",
            "aten::slow_conv3d_forward",
            "aten::conv_depthwise3d",
            "aten::_conv_depthwise2d",
            "mkldnn::_convolution_pointwise",
        ),
        _convolution,
    ),
    "aten::conv_tbc": _convolution_tbc,
    "torchvision::deform_conv2d": _deformable_convolution,
    "aten::linear": _linear,
    "aten::mkldnn_linear": _linear,
    "mkldnn::_linear_pointwise": _linear,
    "aten::mm": _product("self", "mat2"),
    "aten::_int_mm": _product("self", "mat2"),
    "aten::_scaled_mm": _product("self", "mat2"),
    "aten::bmm": _product("self", "mat2"),
    "aten::mv": _product("self", "vec"),
    "aten::dot": _product("self", "tensor"),
    "aten::vdot": _product("self", "other"),
    "aten::addmm": _product("mat1", "mat2", added="self"),
    "aten::_addmm_activation": _product("mat1", "mat2", added="self"),
    "aten::addmv": _product("mat", "vec", added="self"),
    "aten::baddbmm": _product("batch1", "batch2", added="self"),
    "aten::addbmm": _product("batch1", "batch2", added="self"),
    "aten::_trilinear": _bilinear,
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
            "aten::_scaled_dot_product_attention_math_for_mps",
        ),
        _fused_attention,
    ),
    "higher_order::flex_attention": _fused_attention,
    "aten::_flash_attention_forward": _ragged_attention,
    "aten::_efficient_attention_forward": _ragged_attention,
    "aten::_cudnn_attention_forward": _fused_attention,
    "aten::_native_multi_head_attention": _multi_head_attention,
    "aten::_triton_multi_head_attention": _multi_head_attention,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::mkldnn_rnn_layer": _mkldnn_rnn,
    "aten::_cudnn_rnn": _fused_rnn,
    "aten::miopen_rnn": _fused_rnn,
    **dict.fromkeys(
        (
            "aten::native_batch_norm",
            "aten::_native_batch_norm_legit",
            "aten::_native_batch_norm_legit_no_training",
            "aten::_batch_norm_with_update",
            "aten::_batch_norm_no_update",
            "aten::cudnn_batch_norm",
            "aten::miopen_batch_norm",
            "aten::native_layer_norm",
            "aten::native_group_norm",
            "aten::_fused_rms_norm",
        ),
        _normalization,
    ),
}

# Operators outside aten that are known to do none of the counted products.
UNCOUNTED_BY_CONVENTION = frozenset(
    {
        "torchvision::nms",
        "torchvision::roi_align",
        "torchvision::roi_pool",
        "torchvision::ps_roi_align",
        "torchvision::ps_roi_pool",
    }
)
