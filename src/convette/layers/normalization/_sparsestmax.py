"""SparsestMax: ratios that end one-hot, projected on a circle within the simplex (Shao et al. 2019)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def sparsemax(z: Float[Tensor, "*k"], dim: int = -1) -> Float[Tensor, "*k"]:
    r"""Return the Euclidean projection of `z` on the probability simplex along `dim`: ``max(z - tau, 0)``.

    Source: Martins and Astudillo, arXiv 1602.02068.
    """
    ordered, _ = z.sort(dim, descending=True)
    shape = [1] * z.ndim
    shape[dim] = z.shape[dim]
    rank = torch.arange(1, z.shape[dim] + 1, dtype=z.dtype, device=z.device).view(shape)
    excess = ordered.cumsum(dim) - 1
    size = (ordered - excess / rank > 0).sum(dim, keepdim=True).clamp_min(1)
    tau = excess.gather(dim, size - 1) / size.to(z.dtype)
    return (z - tau).clamp_min(0)


def sparsestmax(z: Float[Tensor, "*k"], radius: float | Tensor, dim: int = -1) -> Float[Tensor, "*k"]:
    r"""Return the point of the probability simplex for `z` that lies at least `radius` from its centre.

    Sparsemax first. A result nearer than r to the centre u of the face it lies in is pushed away from it to
    ``u + r (p - u) / |p - u|``; if that leaves the simplex, it is projected back, and the same is done on the smaller
    face with the radius that is left, :math:`\sqrt{r^2 - |u' - u|^2}`. With r = 0 this is sparsemax; from
    :math:`\sqrt{(K - 1) / K}` on (0.8165 for K = 3) one-hot, unless the largest values tie. A tie of all is returned as
    the centre: there is no direction to push it in.

    Args:
        z: any shape, K values along `dim`.
        radius: 0 or more, a number or a scalar tensor.
        dim: the axis of the simplex.

    Cost: at most K - 1 rounds, without a branch on values, so that it compiles whole. `switch_ratios` is the same for
    the few numbers of a layer, without the price of some hundred small operations.
    """
    p = sparsemax(z, dim)
    r = torch.as_tensor(radius, dtype=z.dtype, device=z.device).expand_as(p.sum(dim, keepdim=True))
    done = torch.zeros_like(r, dtype=torch.bool)
    result = p
    tie = max(1e-12, 4 * torch.finfo(z.dtype).eps) ** 2
    for _ in range(max(z.shape[dim] - 1, 1)):
        support = p > 0
        count = support.sum(dim, keepdim=True).to(z.dtype)
        centre = support.to(z.dtype) / count
        away = p - centre
        # Near a tie, p - centre is small and its rounding is not: kept in the face, the result sums to 1.
        away = away - support.to(z.dtype) * away.sum(dim, keepdim=True) / count
        squared = away.square().sum(dim, keepdim=True)
        still = squared < tie  # one-hot, or tied: rounding must not pick
        length = torch.where(still, 1.0, squared).sqrt()
        far = still | (length >= r)
        pushed = centre + r * away / length
        inside = (pushed >= 0).all(dim, keepdim=True)
        result = torch.where(done, result, torch.where(far, p, pushed.clamp(0, 1)))
        done = done | far | inside
        following = sparsemax(pushed, dim)
        smaller = (following > 0).to(z.dtype)
        smaller = smaller / smaller.sum(dim, keepdim=True)
        left = (r.square() - (smaller - centre).square().sum(dim, keepdim=True)).clamp_min(0)
        # sqrt has no slope at 0.
        r = torch.where(done, r, torch.where(left > 0, left, 1.0).sqrt() * (left > 0))
        p = torch.where(done, p, following)
    return torch.where(done, result, p)


def switch_ratios(logits: Float[Tensor, "2 k"], radius: Tensor) -> Float[Tensor, "2 k"]:
    """Return `sparsestmax` of each row: on the CPU in Python numbers with the derivative beside them, else as it is."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return sparsestmax(logits, radius, 1)
    return _Ratios.apply(logits, float(radius))  # type: ignore[no-any-return]


class _Ratios(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, radius: float) -> Tensor:
        rows = [_ratios_of(row, radius) for row in logits.tolist()]
        ctx.save_for_backward(logits.new_tensor([jacobian for _, jacobian in rows]))
        return logits.new_tensor([p for p, _ in rows])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0].unsqueeze(1) @ jacobian).squeeze(1), None


_Rows = list[list[float]]


def _ratios_of(z: list[float], radius: float) -> tuple[list[float], _Rows]:
    """Return the point of `sparsestmax` for one row and its derivative by that row."""
    if not all(math.isfinite(value) for value in z):
        return [math.nan] * len(z), [[math.nan] * len(z) for _ in z]
    p, slope = _sparsemax_of(z)
    for _ in range(max(len(z) - 1, 1)):
        support = [value > 0 for value in p]
        centre = [inside / sum(support) for inside in support]
        away = [a - b for a, b in zip(p, centre, strict=True)]
        length = math.sqrt(sum(value * value for value in away))
        if length < 1e-7 or length >= radius:
            return p, slope
        unit = [value / length for value in away]
        pushed = [c + radius * value for c, value in zip(centre, unit, strict=True)]
        ranks = range(len(z))
        push = [[radius / length * ((i == j) - unit[i] * unit[j]) for j in ranks] for i in ranks]
        slope = _times(push, slope)
        if min(pushed) >= 0:
            return pushed, slope
        p, onto = _sparsemax_of(pushed)
        slope = _times(onto, slope)
        size = sum(value > 0 for value in p)
        gap = sum(((value > 0) / size - c) ** 2 for value, c in zip(p, centre, strict=True))
        radius = math.sqrt(max(radius * radius - gap, 0.0))
    return p, slope


def _sparsemax_of(z: list[float]) -> tuple[list[float], _Rows]:
    total, tau = 0.0, 0.0
    for rank, value in enumerate(sorted(z, reverse=True), start=1):
        total += value
        if value - (total - 1) / rank > 0:
            tau = (total - 1) / rank
    inside = [value > tau for value in z]
    size = sum(inside)
    slope = [[(i == j) * a - a * b / size for j, b in enumerate(inside)] for i, a in enumerate(inside)]
    return [max(value - tau, 0.0) for value in z], slope


def _times(a: _Rows, b: _Rows) -> _Rows:
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]
