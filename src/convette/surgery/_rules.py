"""Which rule labels which PyTorch function."""

from collections.abc import Callable
from typing import Any

from convette.surgery import _rules_compute as compute
from convette.surgery import _rules_elementwise as element
from convette.surgery import _rules_move as move
from convette.surgery import _rules_pieces as pieces
from convette.surgery import _rules_recurrent as recurrent
from convette.surgery import _rules_untie as untie


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that return no channel anyone could follow and change nothing.
READS = _words(
    """
    .shape .dtype .device .ndim .requires_grad .is_cuda .layout .names .grad .grad_fn .is_leaf .itemsize .nbytes
    .is_nested .is_quantized .is_sparse .is_mkldnn .is_mps .is_meta .is_xpu .output_nr ._version ._base .is_cpu
    .name size dim stride numel nelement element_size is_floating_point is_contiguous is_complex storage_offset
    item tolist __len__ __bool__ __int__ __float__ __index__ __contains__ __hash__ __repr__ __format__
    get_device data_ptr untyped_storage storage equal allclose is_same_size is_nonzero is_tensor is_storage
    is_grad_enabled _set_grad_enabled set_grad_enabled _assert device dtype tensor as_tensor arange linspace
    logspace eye from_numpy tril_indices triu_indices rand randn randint randperm new_tensor cartesian_prod
    manual_seed get_default_dtype result_type can_cast promote_types broadcast_shapes compile is_inference
    is_neg is_conj is_signed _has_compatible_shallow_copy_type numpy __array__ __deepcopy__ finfo iinfo
    is_scripting is_tracing nonzero meshgrid
    """
)

_ELEMENTWISE = _words(
    """
    abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow sin cos tan
    asin acos atan sinh cosh tanh arctan asinh acosh atanh sigmoid logit erf erfc erfinv relu relu6 leaky_relu elu
    selu celu gelu silu mish hardswish hardsigmoid hardtanh softplus softsign threshold logsigmoid hardshrink softshrink
    tanhshrink rrelu clamp clamp_min clamp_max clip round floor ceil trunc frac sign sgn reciprocal add sub
    subtract mul multiply div divide true_divide floor_divide remainder fmod rsub addcmul addcdiv lerp where
    masked_fill maximum minimum fmax fmin atan2 eq ne lt le gt ge greater less logical_and logical_or
    logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor isnan isinf isfinite nan_to_num copy
    xlogy heaviside float_power __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
    __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __pow__ __rpow__ __ipow__ __floordiv__
    __rfloordiv__ __mod__ __rmod__ __neg__ __pos__ __abs__ __invert__ __and__ __or__ __xor__ __iand__ __ior__
    __ixor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """
)

_LIKE_FIRST = _words(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout clone contiguous
    detach to type float double half bfloat16 cpu cuda bool int long short requires_grad zeros_like ones_like
    empty_like full_like rand_like randn_like zero fill normal uniform bernoulli .data .real alias type_as
    checkpoint native_dropout
    """
)

_RESHAPE = _words(
    """
    view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as
    """
)

_SAME = _words(
    """
    transpose permute unfold swapaxes swapdims movedim moveaxis t .T .mT .H adjoint repeat_interleave
    channel_shuffle native_channel_shuffle
    """
)

_REDUCTIONS = _words(
    """
    mean sum amax amin var std var_mean std_mean norm vector_norm prod logsumexp any all nansum nanmean median
    aminmax count_nonzero linalg_norm linalg_vector_norm
    """
)

_SPATIAL = _words(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    interpolate upsample upsample_nearest upsample_bilinear max_pool2d_with_indices max_unpool2d
    adaptive_max_pool2d_with_indices fractional_max_pool2d
    """
)


def table() -> dict[str, Callable[..., Any]]:
    """Return the rule of every known function, by `function_name`."""
    rules: dict[str, Callable[..., Any]] = {}
    for names, rule in (
        (_ELEMENTWISE, element.elementwise),
        (_LIKE_FIRST, element.like_first),
        (_RESHAPE, move.reshape),
        (_SAME, move.same_function),
        (_REDUCTIONS, element.reduction),
        (_SPATIAL, compute.spatial),
        (("max", "min"), element.extremum),
        (("argmax", "argmin", "topk", "sort", "argsort", "cumsum", "cumprod", "kthvalue"), element.argument_of),
        (("softmax", "log_softmax", "softmin", "gumbel_softmax"), element.softmax),
        (("normalize",), element.vector_normalize),
        (("glu",), element.glu),
        (("prelu",), element.prelu),
        (("batch_norm", "instance_norm"), element.batch_norm),
        (("layer_norm", "rms_norm"), element.layer_norm),
        (("group_norm",), element.group_norm),
        (("expand", "broadcast_to", "expand_as"), move.expand),
        (("broadcast_tensors",), move.broadcast_tensors),
        (("repeat", "tile"), move.repeat),
        (("split", "chunk", "tensor_split", "split_with_sizes"), pieces.split),
        (("unbind",), pieces.unbind),
        (("select",), pieces.select),
        (("narrow",), pieces.narrow),
        (("__getitem__",), pieces.getitem),
        (("__setitem__",), pieces.setitem),
        (("index_select", "gather", "take_along_dim"), pieces.index_select),
        (("cat", "concat", "concatenate"), pieces.cat),
        (("stack",), pieces.stack),
        (("flip",), move.flip),
        (("roll",), move.roll),
        (("pad",), move.pad),
        (("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), move.created),
        (("im2col",), move.im2col),
        (("pixel_shuffle",), move.pixel_shuffle),
        (("pixel_unshuffle",), move.pixel_unshuffle),
        (("fold",), move.col2im),
        (("conv1d", "conv2d", "conv3d"), compute.convolution),
        (("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), compute.convolution),
        (("linear",), compute.linear),
        (("embedding",), compute.embedding),
        (("matmul", "bmm", "mm", "__matmul__", "__rmatmul__", "mv"), compute.matmul),
        (("addmm", "baddbmm"), compute.addmm),
        (("einsum",), compute.einsum),
        (("scaled_dot_product_attention",), compute.attention),
        (("multi_head_attention_forward",), compute.multi_head_attention),
        (("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent.recurrent),
        (("grid_sample",), compute.grid_sample),
        (("torchvision::roi_align",), compute.roi_align),
        (("convette.surgery._untie.gather_channels",), untie.gather),
        (("convette.surgery._untie.scatter_channels",), untie.scatter),
    ):
        rules.update(dict.fromkeys(names, rule))
    return rules
