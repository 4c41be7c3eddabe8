"""Convolutions and linears whose weights are stored in 2 to 8 bits, really packed: what a low-bit file holds."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.layers.quantization.fake_quantize import (
    WEIGHT_BITS,
    ActivationQuantizer,
    _QuantizedWeight,
)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Return the integers ``-2^(bits-1) ... 2^(bits-1) - 1`` as a stream of bytes, `bits` bits each, lowest bit first.

    ``ceil(bits * numel / 8)`` bytes. Raises `UsageError` for values that do not fit.
    """
    values = integers.detach().cpu().flatten().numpy().astype(np.int64)
    half = 1 << (bits - 1)
    if values.size and (values.min() < -half or values.max() >= half):
        raise UsageError(f"values {values.min()} to {values.max()} do not fit into {bits} bits.")
    raw = (values + half).astype(np.uint16)
    stream = (raw[:, None] >> np.arange(bits, dtype=np.uint16)) & 1
    return torch.from_numpy(np.packbits(stream.astype(np.uint8).ravel(), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 tensor of `shape` that `pack` made `packed` of."""
    count = int(np.prod(shape))
    stream = np.unpackbits(packed.detach().cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    raw = (stream.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(1)
    return torch.from_numpy((raw - (1 << (bits - 1))).astype(np.int8)).reshape(shape)


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes `count` weights of `bits` bits take."""
    return (count * bits + 7) // 8


class _Packed(nn.Module):
    """Packed weights, the scale of each group, the group of each output channel; unpacked once, when first used."""

    packed: Tensor
    scale: Tensor
    group: Tensor | None
    bias: Tensor | None
    activation: ActivationQuantizer

    def _set_up(self, shape: tuple[int, ...], bias: bool, bits: int, activation_bits: int, groups: int | None) -> None:
        if bits not in WEIGHT_BITS:
            raise UsageError(f"weight bits = {bits}: one of {', '.join(map(str, WEIGHT_BITS))}.")
        self.shape, self.bits = shape, bits
        count = shape[0] if groups is None else min(groups, shape[0])
        if not 1 <= count <= 65_535:
            raise UsageError(f"scale_groups = {groups} cannot be.")
        self.register_buffer("packed", torch.zeros(packed_bytes(int(np.prod(shape)), bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(count))
        mapped = torch.zeros(shape[0], dtype=torch.uint8 if count <= 256 else torch.int32)
        self.register_buffer("group", mapped if 1 < count < shape[0] else None)
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.activation = ActivationQuantizer(activation_bits)
        for parameter in self.activation.parameters():
            parameter.requires_grad_(False)
        self._unpacked: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Pack the weights of a quantised layer of the same shape, bits and groups."""
        if not isinstance(old, _QuantizedWeight) or tuple(old.weight.shape) != self.shape or old.bits != self.bits:
            return
        if len(old.log_scale) != len(self.scale):
            return
        self.packed.copy_(pack(old.integers(), self.bits))
        self.scale.copy_(old.log_scale.exp())
        if self.group is not None:
            self.group.copy_(old.group)
        if self.bias is not None and getattr(old, "bias", None) is not None:
            self.bias.copy_(old.bias)  # type: ignore[arg-type]
        self.activation.load_state_dict(old.activation.state_dict())

    @property
    def stored_weights(self) -> int:
        """How many weights the packed bytes hold."""
        return int(np.prod(self.shape))

    def integers(self) -> Tensor:
        """Return the weight as int8."""
        return unpack(self.packed, self.bits, self.shape)

    def scales(self) -> Tensor:
        """Return the scale of each output channel."""
        if self.group is None:
            return self.scale.expand(self.shape[0])
        return self.scale[self.group.long()]

    def weight_values(self) -> Tensor:
        """Return the weight as floats; kept while the packed bytes stay the same."""
        key = (self.packed.data_ptr(), self.packed._version, self.scale._version, self.scale.device, self.scale.dtype)
        if self._unpacked is None or self._unpacked[0] != key:
            scale = self.scales().reshape(-1, *[1] * (len(self.shape) - 1))
            self._unpacked = (key, self.integers().to(self.scale) * scale)
        return self._unpacked[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": None}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bits={self.bits}, scale_groups={len(self.scale)}"


class PackedConv2d(_Packed):
    """A convolution whose weights are stored packed in `bits` bits, group-wise scales beside them; see `QuantConv2d`.

    Inference only: it computes exactly what the `QuantConv2d` it was made of computes. Stored: ``bits`` bits a weight,
    4 bytes a scale, one a channel for its group (where there is more than one and fewer than channels), 4 a bias, 8 for
    the input's quantiser. The floats it computes with are unpacked once and never saved.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        bits: int = 4,
        activation_bits: int = 8,
        scale_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (out_channels, in_channels // groups, *kernel_size)
        self._set_up(shape, bias, bits, activation_bits, scale_groups)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Convolve."""
        weight = self.weight_values()
        return F.conv2d(self.activation(x), weight, self.bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class PackedLinear(_Packed):
    """A linear map whose weights are stored packed; see `PackedConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        activation_bits: int = 8,
        scale_groups: int | None = None,
    ) -> None:
        super().__init__()
        self._set_up((out_features, in_features), bias, bits, activation_bits, scale_groups)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch k"]:
        """Map."""
        return F.linear(self.activation(x), self.weight_values(), self.bias)
