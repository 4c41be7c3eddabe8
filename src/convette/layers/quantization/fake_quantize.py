"""Convolutions and linears that compute as their quantised selves will, and can be trained (straight through).

Values stay float; weights and inputs are rounded to what `bits` can hold. Source of the learned steps: S. Esser and
others, Learned Step Size Quantization, arXiv 1902.08153.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.layers.quantization.observers import group_scales, observed_range

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (0, 2, 3, 4, 5, 6, 7, 8)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        raw = x / scale
        q = torch.clamp(torch.round(raw) + zero, low, high) - zero
        ctx.save_for_backward(raw, scale, zero, q)
        ctx.ends = low, high
        return q * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        raw, scale, zero, q = ctx.saved_tensors
        low, high = ctx.ends
        inside = (raw >= low - zero) & (raw <= high - zero)
        step = grad * torch.where(inside, q - raw, q)
        # Summed over what shares the scale; scaled down so that steps and weights learn at one rate (LSQ).
        step = step.sum_to_size(scale.shape) * (scale.numel() / (grad.numel() * max(high, 1))) ** 0.5
        return grad * inside, step, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    r"""Return `x` rounded to the grid :math:`s (q - z)`, :math:`q \in [low, high]`; `scale` and `zero` broadcast.

    .. math:: \hat x = s\,\bigl(\mathrm{clip}(\mathrm{round}(x/s) + z,\ low,\ high) - z\bigr)

    Gradients: straight through to `x` inside the range and 0 outside; to `s`: :math:`q - z - x/s` inside, the end that
    was hit outside, times :math:`1/\sqrt{N q_{max}}` (LSQ). Zero stays exactly zero.
    """
    return _LearnedStep.apply(x, scale, zero, low, high)  # type: ignore[return-value]


class ActivationQuantizer(nn.Module):
    r"""Rounds activations to `bits` bits, one scale and zero point a tensor (unsigned integers, so 0 is on the grid).

    The scale is learned (as its logarithm, so that it stays positive). `bits` 0: passes its input through. Until
    `calibrate` its range is ``0 ... 2^bits - 1``. Raises `UsageError` for bits that cannot be.
    """

    log_scale: nn.Parameter
    zero: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if bits not in ACTIVATION_BITS:
            raise UsageError(f"activation bits = {bits}: one of {', '.join(map(str, ACTIVATION_BITS))} (0: none).")
        self.bits = bits
        if bits:
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.register_buffer("zero", torch.zeros(()))

    def calibrate(self, values: Tensor, observer: str = "mse") -> None:
        """Take the range of `values` over (see `observed_range`). Raises `DataError` where there is none."""
        if not self.bits:
            return
        low, high = observed_range(values, observer, self.bits)
        levels = 2**self.bits - 1
        scale = (high - low) / levels
        with torch.no_grad():
            self.log_scale.fill_(float(torch.tensor(scale).log()))
            self.zero.fill_(float(min(max(round(-low / scale), 0), levels)))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round `x`."""
        if not self.bits:
            return x
        levels = 2**self.bits - 1
        return fake_quantize(x, self.log_scale.exp(), self.zero, 0, levels)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _QuantizedWeight(nn.Module):
    """What quantised convolutions and linears share: weights on a grid, group-wise scales, the input's quantiser."""

    weight: nn.Parameter
    log_scale: nn.Parameter
    group: Tensor
    bits: int
    activation: ActivationQuantizer

    def _set_up(self, bits: int, activation_bits: int, scale_groups: int | None) -> None:
        if bits not in WEIGHT_BITS:
            raise UsageError(f"weight bits = {bits}: one of {', '.join(map(str, WEIGHT_BITS))}.")
        count = len(self.weight)
        groups = count if scale_groups is None else min(scale_groups, count)
        if groups < 1:
            raise UsageError(f"scale_groups = {scale_groups}: at least one group is needed.")
        self.bits = bits
        self.log_scale = nn.Parameter(torch.zeros(groups))
        self.register_buffer("group", torch.arange(count) % groups if groups < count else torch.arange(count))
        self.activation = ActivationQuantizer(activation_bits)

    @property
    def highest(self) -> int:
        """The largest integer of a weight; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def scales(self) -> Tensor:
        """Return the scale of each output channel."""
        return self.log_scale.exp()[self.group]

    @torch.no_grad()
    def calibrate_weight(self, assignment: str = "sorted") -> None:
        """Group the output channels and set their scales for the least squared error (see `group_scales`)."""
        scales, group = group_scales(self.weight, self.bits, len(self.log_scale), assignment)
        self.log_scale.copy_(scales.log())
        self.group.copy_(group)

    def quantized_weight(self) -> Tensor:
        """Return the weight on its grid, with straight-through gradients."""
        scale = self.scales().reshape(-1, *[1] * (self.weight.ndim - 1))
        return fake_quantize(self.weight, scale, torch.zeros_like(scale), -self.highest, self.highest)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """Return the weight as the integers (int8) that are stored."""
        scale = self.scales().reshape(-1, *[1] * (self.weight.ndim - 1))
        return (self.weight / scale).round().clamp(-self.highest, self.highest).to(torch.int8)


class QuantConv2d(_QuantizedWeight, nn.Conv2d):
    r"""A convolution with `bits`-bit weights and `activation_bits`-bit input: ``conv(q(x), q(W)) + b``, trainable.

    Weights are symmetric, :math:`q \in \pm(2^{b-1} - 1)`, with one learned scale for each of `scale_groups` groups of
    output channels (None: each channel its own); the input as in `ActivationQuantizer`. Arguments before `bits` as in
    ``nn.Conv2d`` (zero padding only). The bias stays float.

    Costs a rounding of weights and input besides the convolution. Becomes `PackedConv2d` (small files), on export int8
    operators. Raises `UsageError` for bits that cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        bits: int = 8,
        activation_bits: int = 8,
        scale_groups: int | None = None,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)  # type: ignore[arg-type]
        self._set_up(bits, activation_bits, scale_groups)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Convolve."""
        return self._conv_forward(self.activation(input), self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, bits={self.bits}, scale_groups={len(self.log_scale)}"


class QuantLinear(_QuantizedWeight, nn.Linear):
    """A linear map with `bits`-bit weights and `activation_bits`-bit input; see `QuantConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        activation_bits: int = 8,
        scale_groups: int | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._set_up(bits, activation_bits, scale_groups)

    def forward(self, input: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch k"]:
        """Map."""
        return F.linear(self.activation(input), self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, bits={self.bits}, scale_groups={len(self.log_scale)}"
