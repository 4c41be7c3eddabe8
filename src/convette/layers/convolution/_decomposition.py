"""Tensors as short sums of outer products of vectors (canonical polyadic form): singular values, least squares."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Factors = list[Tensor]  # one a mode, (batch, rank, size of the mode)


def compose(factors: Factors) -> Float[Tensor, "batch *modes"]:
    """Return the tensors ``sum_r f1[r] x f2[r] x ...`` that factors (batch, rank, size) stand for."""
    letters = "abcdefgh"[: len(factors)]
    text = ",".join(f"nr{letter}" for letter in letters)
    return torch.einsum(f"{text}->n{letters}", factors)


def decompose(tensor: Float[Tensor, "batch *modes"], rank: int, sweeps: int = 30) -> Factors:
    """Return factors of `rank` terms that come close to each of the tensors; in double precision inside.

    Nested singular values give orthogonal terms, the largest of which are kept: exact where `rank` reaches their
    number. Else alternating least squares refine them, which never makes the error larger. The norms of a term are
    the same in every mode.
    """
    exact = tensor.detach().double()
    factors = _nested_svd(exact, rank)
    scale = exact.flatten(1).norm(dim=1)
    for _ in range(sweeps):
        error = (compose(factors) - exact).flatten(1).norm(dim=1)
        if bool((error <= 1e-12 * scale).all()):
            break
        factors = _sweep(exact, factors)
    return [factor.to(tensor.dtype) for factor in _balanced(factors)]


def relative_error(tensor: Float[Tensor, "batch *modes"], factors: Factors) -> float:
    """Return ``|tensor - compose(factors)| / |tensor|`` over the whole batch (0 for zeros)."""
    norm = float(tensor.double().norm())
    error = float((compose([factor.double() for factor in factors]) - tensor.double()).norm())
    return error / norm if norm > 0 else error


def _product(tensors: list[Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result * tensor
    return result


def _nested_svd(tensor: Tensor, rank: int) -> Factors:
    """Unfold along the first mode, take singular vectors, go on with each right one; keep the `rank` largest terms."""
    batch = len(tensor)
    if tensor.ndim == 2:
        return _filled([tensor.unsqueeze(1)], rank)
    left, values, right = torch.linalg.svd(tensor.flatten(2), full_matrices=False)
    most = min(values.shape[1], rank)
    left, values = left[:, :, :most].transpose(1, 2), values[:, :most]
    rest = right[:, :most].unflatten(2, tensor.shape[2:])
    inner = 1
    if tensor.ndim > 3:
        sizes = tensor.shape[2:]
        inner = min(rank, math.prod(min(size, math.prod(sizes[k + 1 :])) for k, size in enumerate(sizes[:-1])))
    parts = _nested_svd(rest.flatten(0, 1), inner)  # (batch * most, inner, size)
    strength = _product([part.norm(dim=2) for part in parts]).unflatten(0, (batch, most)) * values[:, :, None]
    chosen = strength.flatten(1).topk(min(rank, strength[0].numel()), dim=1).indices
    first = (left * values[:, :, None]).repeat_interleave(inner, 1)
    every = [first, *[part.unflatten(0, (batch, most)).flatten(1, 2) for part in parts]]
    return _filled([part.gather(1, chosen[:, :, None].expand(-1, -1, part.shape[2])) for part in every], rank)


def _filled(factors: Factors, rank: int) -> Factors:
    """Add terms that are 0, by their first factor alone so that the others can learn, up to `rank`."""
    missing = rank - factors[0].shape[1]
    if missing <= 0:
        return factors
    result = []
    for mode, factor in enumerate(factors):
        shape = (len(factor), missing, factor.shape[2])
        extra = factor.new_zeros(shape) if mode == 0 else factor.new_full(shape, factor.shape[2] ** -0.5)
        result.append(torch.cat([factor, extra], 1))
    return result


def _sweep(tensor: Tensor, factors: Factors) -> Factors:
    """Solve for one factor after the other with the others fixed."""
    factors = _balanced(factors)
    letters = "abcdefgh"[: len(factors)]
    for mode, letter in enumerate(letters):
        others = [k for k in range(len(factors)) if k != mode]
        gram = _product([factors[k] @ factors[k].transpose(1, 2) for k in others])
        text = ",".join([f"n{letters}", *[f"nr{letters[k]}" for k in others]])
        aim = torch.einsum(f"{text}->nr{letter}", tensor, *[factors[k] for k in others])
        # A touch of ridge: parallel terms make the system singular.
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        ridge = 1e-10 * size * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # A term that is 0 in one mode has no say in the others: keep those from vanishing too.
        factors[mode] = torch.linalg.solve(gram + ridge, aim)
    return factors


def _balanced(factors: Factors) -> Factors:
    """Give the factors of each term the same norm; a term that is 0 keeps unit vectors but for its first factor."""
    norms = [factor.norm(dim=2, keepdim=True) for factor in factors]
    strength = _product(norms)
    share = strength ** (1 / len(factors))
    result = []
    for mode, (factor, norm) in enumerate(zip(factors, norms, strict=True)):
        flat = torch.full_like(factor, factor.shape[2] ** -0.5)
        unit = torch.where(norm > 0, factor / norm.clamp_min(1e-300), flat)
        result.append(torch.where(strength > 0, unit * share, torch.zeros_like(unit) if mode == 0 else unit))
    return result
