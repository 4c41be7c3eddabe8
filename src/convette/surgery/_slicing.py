"""Copying the part of a tensor that stays."""

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGE = 1 << 18  # elements; from here on a whole slice in between costs more than it saves
_PIECE = 1 << 15
# NumPy's take is the quicker one where what stays is scattered, and knows no bfloat16: bits are copied, not numbers.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return the part of `tensor` at the given indices (int64, on the CPU or where `tensor` is) of its dimensions.

    Contiguous, or channels last where `tensor` is. Raises `IndexError` for an index that is out of range. Cost: one
    pass over the rows that stay.
    """
    on_cpu = tensor.is_cpu
    if len(dims) == 1 and (tensor.ndim != 4 or tensor.is_contiguous()):
        ((dim, index),) = dims.items()
        return tensor.index_select(dim, index if on_cpu else index.to(tensor.device))
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if len(dims) > 1 and on_cpu and tensor.numel() >= _LARGE and 0 in dims and tensor.itemsize in _BITS:
        if channels_last:
            moved = {{1: 3, 2: 1, 3: 2}.get(dim, dim): index for dim, index in dims.items()}
            return _in_pieces(tensor.permute(0, 2, 3, 1), moved).permute(0, 3, 1, 2)
        if tensor.is_contiguous():
            return _in_pieces(tensor, dims)
    for dim in sorted(dims):
        index = dims[dim]
        tensor = tensor.index_select(dim, index if on_cpu else index.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def _in_pieces(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Cut a large contiguous tensor a few rows at a time, so that what is in between stays in the cache."""
    shape = list(tensor.shape)
    for dim, index in dims.items():
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[dim]:
            raise IndexError(f"indices of dimension {dim} must lie between 0 and {shape[dim] - 1}.")
        shape[dim] = index.shape[0]
    result = torch.empty(shape, dtype=tensor.dtype)
    bits = _BITS[tensor.itemsize]
    source, target = tensor.detach().view(bits).numpy(), result.view(bits).numpy()
    rows, *rest = [(dim, dims[dim].numpy()) for dim in sorted(dims)]
    last, index = rest.pop()
    step = max(1, _PIECE // max(1, source[0].size))
    for start in range(0, shape[0], step):
        piece = source.take(rows[1][start : start + step], axis=0)
        for dim, other in rest:
            piece = piece.take(other, axis=dim)
        piece.take(index, axis=last, out=target[start : start + step], mode="clip")
    return result
