"""Binary networks: weights and activations of -1 and +1, trained straight through (XNOR-Net, Bi-Real Net).

A convolution becomes XNOR and a count of bits, and a weight takes one bit. Sources: M. Rastegari and others, XNOR-Net,
ECCV 2016, arXiv 1603.05279; I. Hubara and others, Binarized Neural Networks, 2016, arXiv 1602.02830; Z. Liu and others,
Bi-Real Net, ECCV 2018, arXiv 1808.00278. The networks are in `convette.models` (``binary_nin``, ``binary_vgg11``,
``birealnet18``), the bit-packed engine in `convette.runtime` (``binary:cpu``).
"""

import copy
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError, did_you_mean
from convette.surgery import Convert, apply

Surrogate = Literal["approx", "ste"]
WeightGradient = Literal["clip", "magnitude", "xnor"]
Scale = Literal["mean", "one", "learned"]
PADDINGS = (-1, 0, 1)


def sign(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere: unlike ``torch.sign``, zero counts as positive."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.approximate:
            return grads[0] * (2 - 2 * x.abs()).clamp_min(0), None
        return grads[0] * (x.abs() < 1), None


class _BinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.kind = kind
        return alpha * sign(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        weight, alpha = ctx.saved_tensors
        inside = weight.abs() <= 1
        if ctx.kind == "clip":
            return grad * inside, None, None
        if ctx.kind == "magnitude":
            return grad * alpha * inside, None, None
        signs = sign(weight)
        count = weight[0].numel()
        dims = tuple(range(1, weight.ndim))
        through_alpha = signs * (grad * signs).sum(dims, keepdim=True) / count
        # The reference code makes up for tiny gradients by this factor.
        return (grad * alpha * inside + through_alpha) * count * (1 - 1 / max(weight.shape[1], 2)), None, None


class SignActivation(nn.Module):
    r"""Rounds to -1 and +1 (0 to +1), with a surrogate for the gradient.

    - ``"approx"`` (Bi-Real): :math:`2 - 2|x|` on :math:`[-1, 1]`, 0 elsewhere: the derivative of
      :math:`F(x) = 2x + x^2` below and :math:`2x - x^2` above zero, which is -1 and +1 at the ends.
    - ``"ste"``: 1 on :math:`(-1, 1)`.

    Keep the stream before it real and centred: after a ReLU everything is +1. Raises `UsageError` for others.
    """

    def __init__(self, surrogate: str = "approx") -> None:
        super().__init__()
        if surrogate not in get_args(Surrogate):
            raise UsageError(f"surrogate {surrogate!r} is not known.{did_you_mean(surrogate, get_args(Surrogate))}")
        self.surrogate = surrogate

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round `x`."""
        return _Sign.apply(x, self.surrogate == "approx")  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"surrogate={self.surrogate!r}"


class _Binary(nn.Module):
    """What binary convolutions and linears share: latent weights, their scale, the sign of the input."""

    weight: nn.Parameter
    # The first of two steps of training: activations are signs, weights still real (`LatentWeights.real_share`).
    real_weights: bool = False
    # What the trainer does for latent weights: no decay, clamped to [-1, 1].
    training_method = "convette.training.methods.binary_networks:LatentWeights"

    def _set_up(self, surrogate: str, weight_gradient: str, scale: str, threshold: float | int | None) -> None:
        if weight_gradient not in get_args(WeightGradient):
            known = get_args(WeightGradient)
            raise UsageError(f"weight_gradient {weight_gradient!r} is not known.{did_you_mean(weight_gradient, known)}")
        if scale not in get_args(Scale):
            raise UsageError(f"scale {scale!r} is not known.{did_you_mean(scale, get_args(Scale))}")
        self.activation = SignActivation(surrogate)
        self.weight_gradient, self.scale = weight_gradient, scale
        channels = self.weight.shape[1] * getattr(self, "groups", 1)
        shape = (1, channels, *[1] * (self.weight.ndim - 2))
        self.threshold = None if threshold is None else nn.Parameter(torch.full(shape, float(threshold)))
        with torch.no_grad():
            self.weight.normal_(std=0.05)
            start = self.weight.flatten(1).abs().mean(1)
        self.learned_alpha = nn.Parameter(start) if scale == "learned" else None

    def alpha(self) -> Tensor:
        r"""Return :math:`\alpha_f = \mathrm{mean}\,|W_f|` of each filter, which minimises
        :math:`\lVert W - \alpha\,\mathrm{sgn}(W) \rVert`; ones with ``scale="one"``, the parameter with "learned"."""
        weight = self.weight.detach()
        if self.learned_alpha is not None:
            return self.learned_alpha.detach()
        if self.scale == "one":
            return torch.ones_like(weight[:, 0].flatten(1)[:, 0])
        return weight.flatten(1).abs().mean(1)

    def signs(self) -> Tensor:
        """Return the weights as -1 and +1."""
        return sign(self.weight.detach())

    def binary_weight(self) -> Tensor:
        """Return ``alpha * sgn(W)``, two values a filter, with the gradient that `weight_gradient` names."""
        shape = (-1, *[1] * (self.weight.ndim - 1))
        if self.learned_alpha is not None:
            ones = torch.ones_like(self.learned_alpha).reshape(shape)
            signs: Tensor = _BinaryWeight.apply(self.weight, ones, self.weight_gradient)  # type: ignore[assignment]
            return self.learned_alpha.reshape(shape) * signs
        alpha = self.alpha().reshape(shape)
        return _BinaryWeight.apply(self.weight, alpha, self.weight_gradient)  # type: ignore[return-value]

    def _used_weight(self) -> Tensor:
        return self.weight if self.real_weights else self.binary_weight()

    def _rounded(self, x: Tensor) -> Tensor:
        return self.activation(x if self.threshold is None else x - self.threshold)


class BinaryConv2d(_Binary, nn.Conv2d):
    r"""A convolution of signs: ``alpha * conv(sgn(x), sgn(W)) + b``, :math:`\alpha_f = \mathrm{mean}|W_f|`.

    The latent real weights `weight` are trained. `weight_gradient`: ``"clip"`` (Bi-Real's code: the gradient of the
    rounded weight where :math:`|W| \le 1`), ``"magnitude"`` (Bi-Real's magnitude-aware one: that times alpha, so that a
    filter's gradient goes with the size of its weights) or ``"xnor"`` (through alpha too, and scaled as XNOR-Net's code
    does). `scale`:
    ``"mean"``, ``"one"`` (a batch norm behind it makes up for alpha) or ``"learned"`` (a parameter, from the mean on).
    `padding_value`: -1, +1, or 0 (which is no
    sign: the missing taps then count nothing). `threshold`: a learned one for each input channel, from this value, for
    networks whose streams are not centred; None: zero. Other arguments as in ``nn.Conv2d`` (padding in pixels).

    In eval mode the products are exact integers, so that the bit-packed engine gives the same floats, bit for bit. One
    bit a weight in `PackedBinaryConv2d`. Put a batch norm behind it, or before it, and no ReLU between. Raises
    `UsageError` for values that cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        padding_value: int = -1,
        surrogate: str = "approx",
        weight_gradient: str = "clip",
        scale: str = "mean",
        threshold: float | int | None = None,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)  # type: ignore[arg-type]
        if padding_value not in PADDINGS:
            raise UsageError(f"padding_value = {padding_value}: -1, 0 and 1 can be.")
        self.padding_value = padding_value
        self._set_up(surrogate, weight_gradient, scale, threshold)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Convolve the signs."""
        x = padded(self._rounded(input), self.padding, self.padding_value)
        if self.training:
            return F.conv2d(x, self._used_weight(), self.bias, self.stride, 0, self.dilation, self.groups)
        products = F.conv2d(x, sign(self.weight), None, self.stride, 0, self.dilation, self.groups)
        return _scaled(products, None if self.scale == "one" else self.alpha(), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, padding_value={self.padding_value}, scale={self.scale!r}"


class BinaryLinear(_Binary, nn.Linear):
    """A linear map of signs: ``alpha * (sgn(x) @ sgn(W).T) + b``; see `BinaryConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        surrogate: str = "approx",
        weight_gradient: str = "clip",
        scale: str = "mean",
        threshold: float | int | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._set_up(surrogate, weight_gradient, scale, threshold)

    def forward(self, input: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        """Map the signs."""
        x = self._rounded(input)
        if self.training:
            return F.linear(x, self._used_weight(), self.bias)
        return _scaled(F.linear(x, sign(self.weight)), None if self.scale == "one" else self.alpha(), self.bias)


class PackedBinaryConv2d(nn.Module):
    """The inference form of `BinaryConv2d`: one bit a weight, one scale a filter; computes exactly the same.

    Stored: ``bits`` (uint8, eight weights a byte), ``alpha``, ``bias``, ``threshold``.
    """

    bits: Tensor
    alpha: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        bias: bool = False,
        *,
        padding_value: int = -1,
        thresholds: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (out_channels, in_channels // groups, *kernel_size)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_value = padding_value
        self.register_buffer("bits", torch.zeros((self.stored_weights + 7) // 8, dtype=torch.uint8))
        self.register_buffer("alpha", torch.ones(out_channels))
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)
        self.register_buffer("threshold", torch.zeros(1, in_channels, 1, 1) if thresholds else None)

    @property
    def stored_weights(self) -> int:
        """How many weights the bits hold."""
        return int(np.prod(self.shape))

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Take the signs and scales of a `BinaryConv2d` of the same shape."""
        if isinstance(old, BinaryConv2d) and tuple(old.weight.shape) == self.shape:
            positive = (old.weight.detach().cpu() >= 0).flatten().numpy()
            self.bits.copy_(torch.from_numpy(np.packbits(positive, bitorder="little")))
            self.alpha.copy_(old.alpha())
            for mine, theirs in ((self.bias, old.bias), (self.threshold, old.threshold)):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)

    def signs(self) -> Tensor:
        """Return the weights as -1 and +1."""
        found = np.unpackbits(self.bits.cpu().numpy(), count=self.stored_weights, bitorder="little")
        return torch.from_numpy(found.astype(np.float32) * 2 - 1).reshape(self.shape).to(self.alpha)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Convolve the signs."""
        x = sign(x if self.threshold is None else x - self.threshold)
        x = padded(x, self.padding, self.padding_value)
        products = F.conv2d(x, self.signs(), None, self.stride, 0, self.dilation, self.groups)  # type: ignore[arg-type]
        return _scaled(products, self.alpha, self.bias)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, stride={self.stride}, padding={self.padding}, padding_value={self.padding_value}"


def padded(x: Tensor, padding: Any, value: int) -> Tensor:
    """Return `x` with `padding` (rows, columns) of `value` around it."""
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return F.pad(x, (columns, columns, rows, rows), value=float(value)) if rows or columns else x


def _scaled(products: Tensor, alpha: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (products.ndim - 2))
    scaled = products if alpha is None else products * alpha.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)


def pack_binary(network: nn.Module) -> nn.Module:
    """Return a copy of `network` (eval mode) with `PackedBinaryConv2d` in the place of `BinaryConv2d`, logged as edits.

    `convette.save` writes one bit a weight of it.
    """
    network = copy.deepcopy(network).eval()
    edits = []
    for name, layer in network.named_modules():
        if isinstance(layer, BinaryConv2d):
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            given = {key: getattr(layer, key) for key in names} | {"bias": layer.bias is not None}
            given |= {"padding_value": layer.padding_value, "thresholds": layer.threshold is not None}
            edits.append(Convert(name, f"{__name__}:PackedBinaryConv2d", given, keep_activation=False))
    if edits:
        apply(network, *edits)
    return network.eval()


def sign_thresholds(norm: nn.BatchNorm2d, alpha: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what ``sgn(norm(alpha * q + bias))`` is as a comparison of the integer `q`: exact, for every filter.

    .. math:: \mathrm{sgn} = +1 \iff q \ge \theta\ (\gamma > 0),\quad q \le \theta\ (\gamma < 0),\qquad
        \theta = \bigl(\mu - \beta \sqrt{v + \epsilon} / \gamma - b\bigr) / \alpha

    Returned: :math:`\theta` rounded to the integer that decides (up for :math:`\gamma > 0`, down below), the direction
    (+1, -1; 0 for :math:`\gamma = 0`, where the sign is constant) and that constant. Alpha must be above zero; float64.
    """
    if not bool((alpha > 0).all()):
        raise UsageError("sign_thresholds: every alpha must be above zero.")
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    deviation = (variance.double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(deviation)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(deviation)
    shift = 0.0 if bias is None else bias.detach().double()
    safe = torch.where(gamma == 0, 1.0, gamma)
    theta = (mean.double() - beta * deviation / safe - shift) / alpha.double()
    rounded = torch.where(gamma > 0, theta.ceil(), theta.floor())
    return rounded, gamma.sign(), sign(beta)
