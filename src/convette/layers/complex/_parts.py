"""What stands between complex convolutions: norms, activations, pooling, dropout, on pairs of channels."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers.complex.complex_convolution import joined, magnitude, parts

MODES = ("whiten", "naive", "magnitude")


class ComplexBatchNorm2d(nn.Module):
    r"""Batch norm of complex maps: the covariance of real and imaginary parts of a channel becomes the identity.

    .. math:: \begin{pmatrix} a' \\ b' \end{pmatrix} = \Gamma V^{-1/2}
              \begin{pmatrix} a - \mu_a \\ b - \mu_b \end{pmatrix} + \beta, \quad
              V^{-1/2} = \frac{1}{st} \begin{pmatrix} V_{ii} + s & -V_{ri} \\ -V_{ri} & V_{rr} + s \end{pmatrix}, \quad
              s = \sqrt{\det V},\ t = \sqrt{V_{rr} + V_{ii} + 2s}

    Args:
        num_features: complex channels C of an input (n, 2C, h, w).
        eps: added to the variances.
        momentum: weight of a batch in the running statistics.
        mode: "whiten"; "naive", the two parts by themselves; "magnitude", division by the root mean square of ``|z|``
            without shift, which global phase passes (ours).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: another mode or input, fewer than two values a channel in training.

    Cost: 5 parameters a complex channel (symmetric Γ, starting at 1/sqrt(2), and β; "naive" 4, "magnitude" 1). In eval
    it is a real 2x2 map of every pair: it folds, exactly, to a grouped 1x1 convolution (`folded`), and into the
    convolution before it.
    """

    running_mean: Tensor
    running_cov: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        mode: str = "whiten",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UsageError(f"ComplexBatchNorm2d: mode {mode!r} is none of {', '.join(MODES)}.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.momentum, self.mode = eps, momentum, mode
        size = {"whiten": 3, "naive": 2, "magnitude": 1}[mode]
        start = torch.tensor([0.5**0.5, 0.5**0.5, 0.0][:size] if mode == "whiten" else [1.0] * size)
        self.weight = nn.Parameter(torch.empty(num_features, size, **where))
        self.bias = None if mode == "magnitude" else nn.Parameter(torch.zeros(num_features, 2, **where))
        with torch.no_grad():
            self.weight.copy_(start.expand(num_features, size))
        self.register_buffer("running_mean", torch.zeros(num_features, 2, **where))
        # Of real part, imaginary part, and between them.
        self.register_buffer("running_cov", torch.tensor([1.0, 1.0, 0.0], **where).repeat(num_features, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    @property
    def num_features(self) -> int:
        """Complex channels."""
        return self.weight.shape[0]

    def forward(self, x: Float[Tensor, "n pairs h w"]) -> Float[Tensor, "n pairs h w"]:
        check_maps(x, 2 * self.num_features, "ComplexBatchNorm2d", self.training)
        half = x.dtype in (torch.float16, torch.bfloat16)
        a, b = parts(x.float() if half else x)
        if self.training:
            mean, cov = self._batch_statistics(a, b)
        else:
            mean, cov = self.running_mean.unbind(1), self.running_cov.unbind(1)
        matrix, shift = self._affine(mean, cov)
        (m_aa, m_ab, m_ba, m_bb), (s_a, s_b) = map(_columns, matrix), map(_columns, shift)
        y = joined(m_aa * a + m_ab * b + s_a, m_ba * a + m_bb * b + s_b)
        return y.to(x.dtype) if half else y

    def _batch_statistics(self, a: Tensor, b: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        axes = (0, 2, 3)
        mean = (a.mean(axes), b.mean(axes))
        if self.mode == "magnitude":
            mean = (torch.zeros_like(mean[0]), torch.zeros_like(mean[1]))
        a, b = a - _columns(mean[0]), b - _columns(mean[1])
        cov = (a.square().mean(axes), b.square().mean(axes), (a * b).mean(axes))
        self._track(mean, cov, a.numel() // max(a.shape[1], 1))
        return mean, cov

    @torch.no_grad()
    def _track(self, mean: tuple[Tensor, ...], cov: tuple[Tensor, ...], values: int) -> None:
        """Move the running statistics; what is not finite is left out, so that one bad batch spoils nothing."""
        self.num_batches_tracked.add_(1)
        unbiased = torch.stack(cov, 1) * (values / max(values - 1, 1))
        for running, new in ((self.running_mean, torch.stack(mean, 1)), (self.running_cov, unbiased)):
            new = new.to(running.dtype)
            running.copy_(torch.where(torch.isfinite(new), running.lerp(new, self.momentum), running))

    def _affine(self, mean: Any, cov: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the 2x2 map (row by row) and the shift of every channel that the norm is for these statistics."""
        gamma = self.weight.unbind(1)
        rr, ii, ri = cov
        if self.mode == "magnitude":
            scale = gamma[0] * torch.rsqrt(rr + ii + self.eps)
            zero = torch.zeros_like(scale)
            return (scale, zero, zero, scale), (zero, zero)
        rr, ii = rr + self.eps, ii + self.eps
        if self.mode == "naive":
            m_aa, m_bb = gamma[0] * torch.rsqrt(rr), gamma[1] * torch.rsqrt(ii)
            m_ab = m_ba = torch.zeros_like(m_aa)
        else:
            w_aa, w_ab, w_bb = inverse_root(rr, ri, ii)
            g_aa, g_bb, g_ab = gamma
            m_aa, m_ab = g_aa * w_aa + g_ab * w_ab, g_aa * w_ab + g_ab * w_bb
            m_ba, m_bb = g_ab * w_aa + g_bb * w_ab, g_ab * w_ab + g_bb * w_bb
        assert self.bias is not None
        beta = self.bias.unbind(1)
        shift = (beta[0] - m_aa * mean[0] - m_ab * mean[1], beta[1] - m_ba * mean[0] - m_bb * mean[1])
        return (m_aa, m_ab, m_ba, m_bb), shift

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Do to real parts what the batch norm `old` does, and to imaginary parts the same without shift."""
        if not isinstance(old, nn.BatchNorm2d) or old.num_features != self.num_features or old.running_var is None:
            return
        assert old.running_mean is not None
        scale = old.weight if old.affine else torch.ones_like(old.running_var)
        self.eps = old.eps
        if self.mode == "magnitude":
            self.weight.copy_((scale * (2.0**0.5))[:, None])
        else:
            self.weight.zero_()
            self.weight[:, :2] = scale[:, None]
        self.running_mean.zero_()
        self.running_mean[:, 0] = old.running_mean
        self.running_cov.zero_()
        self.running_cov[:, :2] = old.running_var[:, None]
        if self.bias is not None:
            self.bias.zero_()
            if old.affine:
                self.bias[:, 0] = old.bias

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """Return the grouped 1x1 convolution that this is in eval: a 2x2 map of every pair."""
        matrix, shift = self._affine(self.running_mean.unbind(1), self.running_cov.unbind(1))
        width = 2 * self.num_features
        plain = nn.Conv2d(width, width, 1, groups=self.num_features).to(self.running_mean)
        plain.weight.copy_(torch.stack(matrix, 1).view(width, 2, 1, 1))
        assert plain.bias is not None
        plain.bias.copy_(torch.stack(shift, 1).flatten())
        return plain.eval()

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, mode={self.mode!r}"


def _columns(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def inverse_root(
    rr: Float[Tensor, " c"], ri: Float[Tensor, " c"], ii: Float[Tensor, " c"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Return the entries (first, off the diagonal, last) of ``V^{-1/2}`` of symmetric positive 2x2 matrices."""
    # Rounding can make the determinant of nearly singular matrices negative.
    s = (rr * ii - ri.square()).clamp_min(1e-20).sqrt()
    scale = 1 / (s * (rr + ii + 2 * s).sqrt())
    return (ii + s) * scale, -ri * scale, (rr + s) * scale


class ModReLU(nn.Module):
    """``relu(|z| + b) z / |z|``: magnitudes below ``-b`` become 0, phases stay; one learned b a complex channel.

    `channels` 1: one for all; `bias`: its start, at most 0. Equivariant under phase. (n, 2C, ...) -> the same.
    """

    def __init__(self, channels: int = 1, bias: float = -0.1) -> None:
        super().__init__()
        if bias > 0:
            raise UsageError(f"ModReLU: bias {bias} must start at 0 or below: above, small inputs would be blown up.")
        self.bias = nn.Parameter(torch.full((channels,), float(bias)))

    def forward(self, x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n pairs *rest"]:
        size = magnitude(x)
        bias = self.bias.view(-1, *[1] * (x.ndim - 2))
        scale = functional.relu(size + bias) / size
        return (x.unflatten(1, (-1, 2)) * scale.unsqueeze(2)).flatten(1, 2)


class ZReLU(nn.Module):
    """z where both its parts are at least 0, else 0. (n, 2C, ...) -> the same."""

    def forward(self, x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n pairs *rest"]:
        a, b = parts(x)
        inside = ((a >= 0) & (b >= 0)).to(x.dtype)
        return joined(a * inside, b * inside)


class Cardioid(nn.Module):
    """``(1 + cos(phase)) z / 2``: ReLU for real z, phases stay. (n, 2C, ...) -> the same."""

    def forward(self, x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n pairs *rest"]:
        scale = (1 + parts(x)[0] / magnitude(x)) / 2
        return (x.unflatten(1, (-1, 2)) * scale.unsqueeze(2)).flatten(1, 2)


class ComplexMaxPool2d(nn.Module):
    """Of every window the number of the largest magnitude, as it is (the parts by themselves would make new numbers).

    Arguments as in `nn.MaxPool2d`.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, x: Float[Tensor, "n pairs h w"]) -> Float[Tensor, "n pairs rows columns"]:
        a, b = parts(x)
        place = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        # Ties and slopes do not depend on the root.
        _, index = functional.max_pool2d((a.square() + b.square()).detach(), *place, return_indices=True)
        flat = index.flatten(2)
        chosen = [part.flatten(2).gather(2, flat).unflatten(2, index.shape[2:]) for part in (a, b)]
        return joined(*chosen)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class ComplexDropout(nn.Module):
    """Dropout of whole complex numbers, or with `maps` of whole channels: both parts go together."""

    def __init__(self, p: float = 0.5, maps: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UsageError(f"ComplexDropout: p {p} must be 0 to 1.")
        self.p, self.maps = p, maps

    def forward(self, x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n pairs *rest"]:
        if not self.training or self.p == 0:
            return x
        pairs = x.unflatten(1, (-1, 2))
        like = pairs[:, :, :1]
        if self.maps:
            like = like.reshape(*like.shape[:3], -1)[..., :1].view(*like.shape[:3], *[1] * (x.ndim - 2))
        mask = functional.dropout(torch.ones_like(like), self.p, True)
        return (pairs * mask).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"p={self.p}, maps={self.maps}"


class OnParts(nn.Module):
    """Run a module on real and imaginary parts by themselves, as two batches: for what only moves channels."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n more *places"]:
        each = x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)
        y = self.module(each)
        return y.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)
