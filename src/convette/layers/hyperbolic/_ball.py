"""The Poincaré ball of curvature -c: its operations on vectors along one axis, with light hand-written gradients.

Radial maps (``exp_0``, ``log_0``) and Möbius addition are the only primitives; all else is composed of them. Where
gradients are asked for they keep their inputs and one number a vector, not every step in between.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from convette.errors import UsageError

# How near to its border points may come, as a share of the radius, by precision.
_MARGINS = {torch.float64: 1e-5}
_MARGIN = 4e-3


def margin(dtype: torch.dtype) -> float:
    """Return the share of the radius that is kept free at the border."""
    return _MARGINS.get(dtype, _MARGIN)


def tiny(dtype: torch.dtype) -> float:
    """Return the square of a length that counts as 0."""
    return 1e-24 if dtype == torch.float64 else 1e-12


def _dot(x: Tensor, y: Tensor, dim: int) -> Tensor:
    return (x * y).sum(dim, keepdim=True)


def _scaled_length(x: Tensor, c: float, dim: int) -> Tensor:
    """Return ``sqrt(c) |x|``, never 0."""
    return (c * _dot(x, x, dim)).clamp_min(tiny(x.dtype)).sqrt()


def _exp_factor(s: Tensor) -> Tensor:
    return torch.tanh(s).clamp_max(1 - margin(s.dtype)) / s


def _log_factor(s: Tensor) -> Tensor:
    return torch.atanh(s.clamp_max(1 - margin(s.dtype))) / s


class _Radial(torch.autograd.Function):
    """``g(sqrt(c)|x|) x`` for g of exp_0 (grow False) or log_0 (True), kept within the margin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: float, dim: int, grow: bool) -> Tensor:
        s = _scaled_length(x, c, dim)
        factor = _log_factor(s) if grow else _exp_factor(s)
        ctx.save_for_backward(x, s, factor)
        ctx.c, ctx.dim, ctx.grow = c, dim, grow
        return factor * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        x, s, factor = ctx.saved_tensors
        edge = 1 - margin(s.dtype)
        if ctx.grow:
            inside = s < edge
            slope, start = 1 / (1 - s.clamp_max(edge).square()), 2 / 3 + 0.8 * s.square()
        else:
            inside = torch.tanh(s) < edge
            slope, start = 1 - torch.tanh(s).square(), -2 / 3 + 8 / 15 * s.square()
        # Past the margin the length is fixed: its slope is 0.
        slope = torch.where(inside, slope, torch.zeros_like(slope))
        bend = torch.where(s < (1e-4 if s.dtype == torch.float64 else 1e-2), start, (slope - factor) / s.square())
        return factor * upstream + ctx.c * bend * _dot(upstream, x, ctx.dim) * x, None, None, None


class _MobiusAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, c: float, dim: int) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.c, ctx.dim = c, dim
        return _mobius(x, y, c, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, y), c, dim = ctx.saved_tensors, ctx.c, ctx.dim
        xx, yy, xy = c * _dot(x, x, dim), c * _dot(y, y, dim), c * _dot(x, y, dim)
        ux, uy = _dot(upstream, x, dim), _dot(upstream, y, dim)
        a, b, bottom = 1 + 2 * xy + yy, 1 - xx, 1 + 2 * xy + xx * yy
        theta, k = (a * ux + b * uy) / bottom, 2 * c / bottom
        dx = a / bottom * upstream - k * (theta * yy + uy) * x - k * (theta - ux) * y
        dy = b / bottom * upstream + k * (ux - theta) * x + k * (ux - xx * theta) * y
        return dx, dy, None, None


def _mobius(x: Tensor, y: Tensor, c: float, dim: int) -> Tensor:
    xx, yy, xy = c * _dot(x, x, dim), c * _dot(y, y, dim), c * _dot(x, y, dim)
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy).clamp_min(1e-15)


def _by_hand(*tensors: Tensor) -> bool:
    # Tracers, exporters and compilers see plain operations.
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class PoincareBall:
    r"""Vectors of length below :math:`1/\sqrt c`; lengths at x count :math:`\lambda_x = 2/(1 - c|x|^2)` times.

    Points are kept 4e-3 of the radius away from the border (1e-5 in double precision). All functions work along `dim`
    and on vectors of the same shape, or shapes that broadcast.

    Attributes:
        c: minus the curvature, fixed.
    """

    c: float = 0.1

    def __post_init__(self) -> None:
        """Refuse curvatures that are no ball's."""
        if not 0 < self.c < math.inf:
            raise UsageError(f"PoincareBall: c {self.c} must be a number above 0.")

    def exp0(self, v: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
        r"""Return :math:`\exp_0(v) = \tanh(\sqrt c|v|)\, v / (\sqrt c|v|)`, the point that tangent `v` leads to."""
        if _by_hand(v):
            return _Radial.apply(v, self.c, dim, False)  # type: ignore[return-value]
        return _exp_factor(_scaled_length(v, self.c, dim)) * v

    def log0(self, y: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
        r"""Return :math:`\log_0(y) = \mathrm{atanh}(\sqrt c|y|)\, y / (\sqrt c|y|)`, the tangent that leads to `y`."""
        if _by_hand(y):
            return _Radial.apply(y, self.c, dim, True)  # type: ignore[return-value]
        return _log_factor(_scaled_length(y, self.c, dim)) * y

    def project(self, x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
        """Return `x`, pulled back to the margin where it lies beyond."""
        return x * ((1 - margin(x.dtype)) / _scaled_length(x, self.c, dim)).clamp_max(1)

    def conformal(self, x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*reduced"]:
        r"""Return :math:`\lambda_x`, with length 1 along `dim`."""
        return 2 / (1 - self.c * _dot(x, x, dim)).clamp_min(1e-15)

    def add(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        r"""Return the Möbius sum :math:`x \oplus y`."""
        x, y = torch.broadcast_tensors(x, y)
        if _by_hand(x, y):
            return _MobiusAdd.apply(x, y, self.c, dim)  # type: ignore[return-value]
        return _mobius(x, y, self.c, dim)

    def exp(self, x: Float[Tensor, "..."], v: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        r"""Return the point that tangent `v` at `x` leads to: :math:`x \oplus \exp_0(\lambda_x v / 2)`."""
        return self.add(x, self.exp0(self.conformal(x, dim) / 2 * v, dim), dim)

    def log(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
        r"""Return the tangent at `x` that leads to `y`: :math:`2/\lambda_x \log_0(-x \oplus y)`."""
        return 2 / self.conformal(x, dim) * self.log0(self.add(-x, y, dim), dim)

    def distance(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "*reduced"]:
        r"""Return :math:`2/\sqrt c\; \mathrm{atanh}(\sqrt c|-x \oplus y|)`, with length 1 along `dim`."""
        return 2 * self.log0(self.add(-x, y, dim), dim).norm(dim=dim, keepdim=True)

    def gyrate(
        self,
        u: Float[Tensor, "..."],
        v: Float[Tensor, "..."],
        w: Float[Tensor, "..."],
        dim: int = -1,
    ) -> Float[Tensor, "..."]:
        r"""Return :math:`\mathrm{gyr}[u, v] w = -(u \oplus v) \oplus (u \oplus (v \oplus w))`: a rotation of w."""
        c = self.c
        uu, vv, uv = _dot(u, u, dim), _dot(v, v, dim), _dot(u, v, dim)
        uw, vw = _dot(u, w, dim), _dot(v, w, dim)
        for_u = -(c**2) * uw * vv + c * vw + 2 * c**2 * uv * vw
        for_v = -(c**2) * vw * uu - c * uw
        return w + 2 * (for_u * u + for_v * v) / (1 + 2 * c * uv + c**2 * uu * vv).clamp_min(1e-15)

    def transport(
        self,
        x: Float[Tensor, "..."],
        y: Float[Tensor, "..."],
        v: Float[Tensor, "..."],
        dim: int = -1,
    ) -> Float[Tensor, "..."]:
        """Return the tangent `v` at `x` carried to `y` along the geodesic: lengths stay."""
        return self.gyrate(y, -x, v, dim) * self.conformal(x, dim) / self.conformal(y, dim)

    def midpoint(self, x: Float[Tensor, "*shape"], over: tuple[int, ...], dim: int = -1) -> Float[Tensor, "*mean"]:
        """Return the gyromidpoint of the points along the axes `over`, kept with length 1: in one pass, closed form."""
        weights = self.conformal(x, dim) / 2
        count = math.prod([x.shape[axis] for axis in over])
        sums = (weights * x).sum(over, keepdim=True)
        mean = sums / (weights.sum(over, keepdim=True) - count / 2).clamp_min(1e-15)
        gamma = (1 - self.c * _dot(mean, mean, dim)).clamp_min(1e-15).rsqrt()
        return gamma / (1 + gamma) * mean

    def frechet_mean(self, x: Float[Tensor, "n d"], steps: int = 50) -> Float[Tensor, "1 d"]:
        """Return the point of least squared distance to the points (n, d), by steps along the mean tangent."""
        mean = self.midpoint(x, (0,))
        for _ in range(steps):
            mean = self.exp(mean, self.log(mean, x).mean(0, keepdim=True))
        return mean
