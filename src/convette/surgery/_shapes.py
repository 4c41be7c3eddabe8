"""Shapes of the commonest results, worked out here: PyTorch's own way, on the meta device, takes up to a millisecond.

Each function returns the shape of the result, or None where its arguments are not of the plain form: then PyTorch is
asked. All operands are contiguous, and so are the results. Every formula is tested against PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Shape = tuple[int, ...] | None


def _pair(value: Any, ndim: int) -> Sequence[Any] | None:
    if isinstance(value, int):
        return (value,) * ndim
    return value if isinstance(value, tuple | list) and len(value) == ndim else None


def _slid(sizes: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int] | None:
    """Return the lengths after a window has slid over `sizes`."""
    ndim = len(sizes)
    parts = [_pair(value, ndim) for value in (kernel, stride, padding, dilation)]
    if any(part is None for part in parts):
        return None
    result = []
    for size, k, s, p, d in zip(sizes, *parts, strict=True):  # type: ignore[arg-type]
        length = size + 2 * p - d * (k - 1) - 1
        if length < 0 or s < 1:
            return None
        result.append(length // s + 1)
    return result


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Shape:
    """``conv1d``, ``conv2d``, ``conv3d``."""
    given, kernel = x.shape, weight.shape
    if len(given) != len(kernel) or given[1] != kernel[1] * groups or kernel[0] % groups:
        return None
    if bias is not None and bias.shape != kernel[:1]:
        return None
    sizes = _slid(given[2:], kernel[2:], stride, padding, dilation)
    return None if sizes is None else (given[0], kernel[0], *sizes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Shape:
    """``linear``."""
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return (*x.shape[:-1], weight.shape[0])


def cat(tensors: Any, dim: Any = 0) -> Shape:
    """``cat``."""
    first = tensors[0]
    if not isinstance(dim, int) or not first.ndim or not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    shape = list(first.shape)
    rest, total = (*shape[:dim], *shape[dim + 1 :]), 0
    for tensor in tensors:
        other = tensor.shape
        if (*other[:dim], *other[dim + 1 :]) != rest or len(other) != len(shape):
            return None
        total += other[dim]
    shape[dim] = total
    return tuple(shape)


def adaptive_pool(x: Tensor, output_size: Any) -> Shape:
    """``adaptive_avg_pool2d``."""
    sizes = _pair(output_size, 2)
    if x.ndim != 4 or sizes is None:
        return None
    return (*x.shape[:2], *[old if new is None else new for old, new in zip(x.shape[2:], sizes, strict=True)])


def mean(x: Tensor, dim: Any = None, keepdim: bool = False) -> Shape:
    """``mean``."""
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(dims, tuple | list) or not dims or not all(-x.ndim <= axis < x.ndim for axis in dims):
        return None
    axes = {axis % x.ndim for axis in dims}
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes)


def max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Shape:
    """``max_pool2d``."""
    if ceil_mode or return_indices or x.ndim != 4:
        return None
    sizes = _slid(x.shape[2:], kernel_size, stride or kernel_size, padding, dilation)
    return None if sizes is None else (*x.shape[:2], *sizes)


def matmul(left: Tensor, right: Tensor) -> Shape:
    """``matmul``, ``bmm``, ``@`` of equally many batches."""
    if left.ndim != right.ndim or left.ndim < 2 or left.shape[-1] != right.shape[-2]:
        return None
    if left.shape[:-2] != right.shape[:-2]:
        return None
    return (*left.shape[:-1], right.shape[-1])


SHAPES: dict[str, Callable[..., Shape]] = {
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "linear": linear,
    "cat": cat,
    "adaptive_avg_pool2d": adaptive_pool,
    "mean": mean,
    "max_pool2d": max_pool,
    "matmul": matmul,
    "bmm": matmul,
    "__matmul__": matmul,
}
