"""What convolution layers of all rooms share: sizes in pairs, and the plain convolution that one has become."""

from typing import Any

import torch
from torch import Tensor, nn

_KINDS: dict[int, Any] = {4: nn.Conv2d, 5: nn.Conv3d}


def pair(value: Any) -> tuple[int, int]:
    """Return a size in rows and columns: one number stands for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@torch.no_grad()
def plain_convolution(layer: Any, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Any:
    """Return the convolution of PyTorch, in eval mode, that has `weight` and `bias` and stands where `layer` does.

    Stride, padding, dilation, groups (unless given) and the mode of padding are the layer's; sizes are the weight's.
    """
    parts: int = layer.groups if groups is None else groups
    out, fan, *kernel = weight.shape
    plain = _KINDS[weight.ndim](
        fan * parts,
        out,
        tuple(kernel),
        layer.stride,
        layer.padding,
        layer.dilation,
        parts,
        bias is not None,
        getattr(layer, "padding_mode", "zeros"),
        weight.device,
        weight.dtype,
    )
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain.eval()
