"""Poincaré ResNet: convolutions, batch norms and shortcuts on the Poincaré ball (van Spengler et al. 2023).

Between layers features are tangent vectors at the origin, along the channels; so ReLU, pooling and everything else that
works on ordinary maps goes between them, and the layers drop into any network.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._checks import check_maps, check_plain
from convette.layers._convolutions import pair
from convette.layers._folding import Stays
from convette.layers.hyperbolic._ball import PoincareBall, margin, tiny

INITS = ("dirac", "eye", "normal")
# Beyond this, sinh has left every point at the border long ago.
_LARGEST = 40.0


def beta_ratio(channels: int, taps: int) -> float:
    """Return ``beta(taps channels) / beta(channels)``, beta(a) = B(a/2, 1/2): beta-concatenation keeps norms."""

    def log_beta(size: int) -> float:
        return math.lgamma(size / 2) + math.lgamma(0.5) - math.lgamma((size + 1) / 2)

    return math.exp(log_beta(channels * taps) - log_beta(channels))


def _full(layer: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Call `layer` in single precision at least, and return its result in the type of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return layer(x.float()).to(x.dtype)
    return layer(x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else layer(x)


def _connected(
    products: Tensor, squares: Tensor, lengths: Tensor, offsets: Tensor | None, c: float
) -> Float[Tensor, "n k *places"]:
    r"""Return the tangents of a hyperbolic FC layer, from ``<v, z_k>`` of tangents v, ``|v|²`` and ``|z_k|``.

    .. math:: v_k = \frac{2|z_k|}{\sqrt c}\, \mathrm{asinh}\left(\lambda_x \langle \sqrt c x, \hat z_k \rangle
              \cosh(2\sqrt c r_k) - (\lambda_x - 1) \sinh(2 \sqrt c r_k)\right), \quad x = \exp_0(v)

    and with ``w = sinh(sqrt(c) v) / sqrt(c)``, ``y = w / (1 + sqrt(1 + c|w|²))`` the tangent of y, whose length is
    ``asinh(sqrt(c)|w|) / (2 sqrt(c))``, at most that of the margin: no atanh near 1 is needed.
    """
    root, free = math.sqrt(c), margin(products.dtype)
    shape = (1, -1, *[1] * (products.ndim - 2))
    s = (c * squares).clamp_min(tiny(products.dtype)).sqrt()
    t = torch.tanh(s).clamp_max(1 - free)
    conformal = 2 / (1 - t.square())
    lengths = lengths.clamp_min(1e-15).view(shape)
    angle = conformal * (root * t / s) * products / lengths
    if offsets is not None:
        turn = 2 * root * offsets.view(shape)
        angle = angle * torch.cosh(turn) - (conformal - 1) * torch.sinh(turn)
    w = torch.sinh((2 * lengths * torch.asinh(angle)).clamp(-_LARGEST, _LARGEST))
    size = w.square().sum(1, keepdim=True).clamp_min(tiny(products.dtype)).sqrt()
    return w * (torch.asinh(size) / 2).clamp_max(math.atanh(1 - free)) / (root * size)


class PoincareLinear(nn.Module):
    r"""A fully connected layer of the Poincaré ball, from tangents (n, in) to tangents (n, out).

    Output k is the signed distance to a hyperplane (HNN++): :math:`y = \log_0(FC(\exp_0(x)))`, see `_connected`. As
    c goes to 0 it becomes :math:`2 x Z - 2 r_k |z_k|`.

    Args:
        in_features: as in `nn.Linear`, like `out_features` and `bias` (the offsets r).
        c: minus the curvature of the ball.
        init: "dirac" and "eye" (Z = 1/2 eye: the identity), "normal" (it collapses norms in deep networks).

    Raises:
        UsageError: c not above 0, an unknown init.

    Does not fold; `euclidean` is its flat limit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        c: float = 0.1,
        init: str = "dirac",
    ) -> None:
        super().__init__()
        self.ball = PoincareBall(c)
        self.init = _known_init(init)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity, or draw the weights."""
        _draw(self.weight[:, :, None], 1.0, self.init)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Float[Tensor, "n c"]) -> Float[Tensor, "n out"]:
        return _full(self._forward, input)

    def _forward(self, x: Tensor) -> Tensor:
        weight, offsets = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        products = functional.linear(x, weight)
        return _connected(products, x.square().sum(1, keepdim=True), weight.norm(dim=1), offsets, self.ball.c)

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Do what the linear layer `old` does, in the flat limit."""
        if isinstance(old, nn.Linear) and old.weight.shape == self.weight.shape:
            _take(self.weight, self.bias, old.weight, old.bias, 1.0)

    @torch.no_grad()
    def euclidean(self) -> nn.Linear:
        """Return the linear layer that this becomes as c goes to 0: to look at, not to deploy."""
        plain = nn.Linear(self.weight.shape[1], self.weight.shape[0]).to(self.weight)
        _flatten(plain, self.weight, self.bias, 1.0)
        return plain

    def folded(self) -> nn.Module:
        """Raise `Stays`: it is not linear."""
        raise Stays("PoincareLinear measures distances on a curved space, which no linear layer does.")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, c={self.ball.c}"


class PoincareConv2d(nn.Module):
    r"""A convolution of the Poincaré ball, from tangents (n, in, h, w) to tangents (n, out, h, w).

    Every patch of K positions is scaled by :math:`\beta_{nK}/\beta_n` (beta-concatenation), led onto the ball, passed
    through a hyperbolic FC layer (`PoincareLinear`) and back. Products and lengths of patches are an ordinary
    convolution and a sum of squares: no patch is unfolded.

    Args:
        in_channels: as in `nn.Conv2d`, like all further arguments up to `dtype`; `bias` are the offsets r. Only
            dilation 1, one group and zero padding.
        c: minus the curvature of the ball.
        init: "dirac", 1/2 at the centre tap of channel o mod in, norms pass (ours, recommended); "eye", the published
            1/2 eye over patches, which reads the first channels' taps only; "normal", whose norms collapse with depth.

    Raises:
        UsageError: groups, dilation or padding it does not have, an unknown init, another input.

    Cost: the MACs of the Euclidean convolution, and about ten transcendental functions a result. Does not fold.

    Source: Poincaré ResNet, van Spengler et al. 2023, arXiv 2303.14027; the conformal factor is Ganea's and Shimizu's,
    not the published code's ``2 (1 - c|x|²)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        c: float = 0.1,
        init: str = "dirac",
    ) -> None:
        super().__init__()
        check_plain("PoincareConv2d", groups=groups, dilation=dilation, padding=padding, padding_mode=padding_mode)
        self.ball, self.init = PoincareBall(c), _known_init(init)
        self.kernel_size, self.stride, self.padding = map(pair, (kernel_size, stride, padding))
        # Of the width it was made with: a network whose channels are removed then computes what it did without them.
        self.ratio = beta_ratio(in_channels, math.prod(self.kernel_size))
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, *self.kernel_size, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start so that norms pass, or draw the weights."""
        _draw(self.weight.flatten(2), self.ratio, self.init)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out rows columns"]:
        check_maps(input, self.in_channels, "PoincareConv2d")
        return _full(self._forward, input)

    def _forward(self, x: Tensor) -> Tensor:
        weight, offsets = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        products = self.ratio * functional.conv2d(x, weight, None, self.stride, self.padding)
        taps = math.prod(self.kernel_size)
        squares = x.square().sum(1, keepdim=True)
        squares = functional.avg_pool2d(squares, self.kernel_size, self.stride, self.padding) * (taps * self.ratio**2)
        return _connected(products, squares, weight.flatten(1).norm(dim=1), offsets, self.ball.c)

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Do what the convolution `old` does, in the flat limit."""
        if isinstance(old, nn.Conv2d) and old.weight.shape == self.weight.shape:
            _take(self.weight, self.bias, old.weight, old.bias, self.ratio)

    @torch.no_grad()
    def euclidean(self) -> nn.Conv2d:
        """Return the convolution that this becomes as c goes to 0: to look at, not to deploy."""
        plain = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)  # type: ignore
        plain.to(self.weight)
        _flatten(plain, self.weight, self.bias, self.ratio)
        return plain

    def folded(self) -> nn.Module:
        """Raise `Stays`: it is not linear."""
        raise Stays("PoincareConv2d measures distances on a curved space, which no convolution does.")

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, c={self.ball.c}"
        )


def _known_init(init: str) -> str:
    if init not in INITS:
        raise UsageError(f"init {init!r} is none of {', '.join(INITS)}.")
    return init


def _draw(weight: Float[Tensor, "o i taps"], ratio: float, init: str) -> None:
    out, channels, taps = weight.shape
    if init == "normal":
        weight.normal_(0, (2 * channels * taps * out) ** -0.5)
        return
    weight.zero_()
    for o in range(out):
        if init == "dirac":
            weight[o, o % channels, taps // 2] = 0.5 / ratio
        elif o < channels * taps:
            weight[o, o // taps, o % taps] = 0.5


def _take(weight: Tensor, offsets: Tensor | None, old: Tensor, bias: Tensor | None, ratio: float) -> None:
    weight.copy_(old / (2 * ratio))
    if offsets is not None:
        offsets.zero_()
        if bias is not None:
            offsets.copy_(-bias / (2 * weight.flatten(1).norm(dim=1)).clamp_min(1e-6))


def _flatten(plain: nn.Linear | nn.Conv2d, weight: Tensor, offsets: Tensor | None, ratio: float) -> None:
    assert plain.bias is not None
    plain.weight.copy_(2 * ratio * weight)
    plain.bias.zero_()
    if offsets is not None:
        plain.bias.copy_(-2 * offsets * weight.flatten(1).norm(dim=1))


class PoincareBatchNorm2d(nn.Module):
    r"""Batch norm of the Poincaré ball: points are moved to a learned midpoint and spread to a learned variance.

    .. math:: \mu = \text{gyromidpoint}(x_i), \quad \sigma^2 = \mathrm{mean}\, d(x_i, \mu)^2, \quad
              y_i = \exp_{\mu^*}\left(\sqrt{s / (\sigma^2 + \epsilon)}\; P_{\mu \to \mu^*} \log_\mu(x_i)\right)

    of the n h w points :math:`x = \exp_0` of tangents (n, c, h, w); the result is tangents again. The midpoint has a
    closed form where the Fréchet mean is a search.

    Args:
        num_features: channels.
        eps: added to the variance, a single number.
        momentum: weight of a batch in the running statistics (the published code has none and uses the batch's in
            eval too).
        affine: learn the midpoint ``exp_0(bias)``, from 0, and the variance s (`weight`), from 1.
        c: minus the curvature of the ball.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: another input, fewer than two points in training.

    Cost: c + 1 parameters. Does not fold.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        momentum: float = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        c: float = 0.1,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ball, self.eps, self.momentum = PoincareBall(c), eps, momentum
        self.weight = nn.Parameter(torch.ones(1, **where)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **where)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features, **where))
        self.register_buffer("running_var", torch.ones(1, **where))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    @property
    def num_features(self) -> int:
        """Channels."""
        return self.running_mean.shape[0]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.num_features, "PoincareBatchNorm2d", self.training)
        return _full(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        ball = self.ball
        points = ball.exp0(x, 1)
        if self.training:
            mean = ball.midpoint(points, (0, 2, 3), 1)
        else:
            mean = ball.exp0(self.running_mean.to(x.dtype).view(1, -1, 1, 1), 1)
        # Half of each tangent at the midpoint, times its conformal factor: half the distance long.
        tangents = ball.log0(ball.add(-mean, points, 1), 1)
        if self.training:
            variance = 4 * tangents.square().sum(1).mean()
            self._track(ball.log0(mean, 1).flatten(), variance)
        else:
            variance = self.running_var.to(x.dtype)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None or self.bias is None:
            return tangents * scale
        aim = ball.exp0(self.bias.to(x.dtype).view(1, -1, 1, 1), 1)
        turned = ball.gyrate(aim, -mean, tangents, 1) * (scale * self.weight.to(x.dtype).clamp_min(0).sqrt())
        return ball.log0(ball.add(aim, ball.exp0(turned, 1), 1), 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; what is not finite is left out, so that one bad batch spoils nothing."""
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, mean), (self.running_var, variance.view(1))):
            new = new.to(running.dtype)
            running.copy_(torch.where(torch.isfinite(new), running.lerp(new, self.momentum), running))

    def folded(self) -> nn.Module:
        """Raise `Stays`: it is not linear."""
        raise Stays("PoincareBatchNorm2d moves points of a curved space, which no linear layer does.")

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, c={self.ball.c}"


class PoincareAdd(nn.Module):
    r"""The shortcut's sum, :math:`\log_0(\exp_0(f) \oplus \exp_0(s))` of tangents along the channels.

    Möbius addition is not commutative: `order` "fr" adds the shortcut to the features, "rf" the features to it.
    """

    def __init__(self, c: float = 0.1, order: str = "fr") -> None:
        super().__init__()
        if order not in ("fr", "rf"):
            raise UsageError(f"PoincareAdd: order {order!r} is 'fr' or 'rf'.")
        self.ball, self.order = PoincareBall(c), order

    def forward(
        self, features: Float[Tensor, "n c h w"], shortcut: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        pair = (features, shortcut) if self.order == "fr" else (shortcut, features)

        def added(one: Tensor) -> Tensor:
            ball = self.ball
            return ball.log0(ball.add(ball.exp0(one, 1), ball.exp0(pair[1].to(one.dtype), 1), 1), 1)

        return _full(added, pair[0])
