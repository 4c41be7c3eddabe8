"""Observers: from values to the range a quantiser covers; and groups of channels that share a scale."""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from convette.errors import DataError, UsageError, did_you_mean

Observer = Literal["min_max", "percentile", "mse", "entropy"]
Assignment = Literal["sorted", "contiguous", "kmeans"]
PERCENTILE = 99.99
_FRACTIONS = 100
_BINS = 2048
_RATIO = 1.04  # between neighbouring scales that are tried for weights


def observed_range(values: Tensor, observer: str = "mse", bits: int = 8) -> tuple[float, float]:
    r"""Return the range ``low, high`` (0 in it) that a uniform quantiser of `bits` bits should cover for `values`.

    - ``"min_max"``: everything.
    - ``"percentile"``: the 99.99th percentile of the magnitudes on each side.
    - ``"mse"``: the share :math:`f` of the whole range, of 100 shares, with the least :math:`\sum (x - \hat x)^2`.
    - ``"entropy"``: the share whose quantised histogram is nearest to the true one in Kullback-Leibler divergence (2048
      bins, as in TensorRT's calibration, Migacz 2017).

    Raises `DataError` for no values, values that are not finite, or all zero; `UsageError` for an unknown observer.
    """
    if observer not in get_args(Observer):
        raise UsageError(f"observer {observer!r} is not known.{did_you_mean(observer, get_args(Observer))}")
    flat = values.detach().float().flatten()
    if not len(flat) or not torch.isfinite(flat).all():
        raise DataError("no range can be learnt: there are no values, or some are not finite (NaN or infinity).")
    low, high = min(0.0, float(flat.min())), max(0.0, float(flat.max()))
    if low == high:
        raise DataError("no range can be learnt: all values are zero (a constant activation); give other images.")
    if observer == "min_max":
        return low, high
    if observer == "percentile":
        flat = _thinned(flat)
        below, above = -flat[flat < 0], flat[flat > 0]
        return -_percentile(below), _percentile(above)
    share = _mse_share(_thinned(flat), low, high, bits) if observer == "mse" else _entropy_share(flat, bits)
    return share * low, share * high


def _thinned(flat: Tensor, most: int = 1 << 18) -> Tensor:
    # Every k-th value says as much: the extremes are looked at apart.
    return flat[:: max(1, len(flat) // most)]


def _percentile(magnitudes: Tensor) -> float:
    return float(np.percentile(magnitudes.numpy(), PERCENTILE)) if len(magnitudes) else 0.0


def _mse_share(flat: Tensor, low: float, high: float, bits: int) -> float:
    levels = 2**bits - 1
    best, found = math.inf, 1.0
    for step in range(1, _FRACTIONS + 1):
        share = step / _FRACTIONS
        scale = share * (high - low) / levels
        zero = round(-share * low / scale)
        error = float((((flat / scale).round().add_(zero).clamp_(0, levels) - zero) * scale - flat).square().sum())
        if error <= best:
            best, found = error, share
    return found


def _entropy_share(flat: Tensor, bits: int) -> float:
    magnitudes = flat.abs()
    counts = torch.histc(magnitudes, _BINS, 0, float(magnitudes.max())).numpy().astype(np.float64)
    counts[0] = 0  # zeros (after a ReLU) are exact at any scale
    if not counts.any():
        return 1.0
    levels = 2**bits if float(flat.min()) >= 0 else 2 ** (bits - 1)
    best, found = math.inf, _BINS
    for end in range(levels, _BINS + 1, 16):
        divergence = _divergence(counts, end, levels)
        if divergence < best:
            best, found = divergence, end
    return found / _BINS


def _divergence(counts: np.ndarray, end: int, levels: int) -> float:
    true = counts[:end].copy()
    true[-1] += counts[end:].sum()  # what is clipped lands in the last bin
    bins = np.arange(end) * levels // end
    nonzero = counts[:end] > 0
    sums = np.bincount(bins, counts[:end], levels)
    filled = np.bincount(bins, nonzero.astype(float), levels)
    spread = np.where(nonzero, (sums / np.maximum(filled, 1))[bins], 0.0)
    total, approximated = true.sum(), spread.sum()
    if approximated == 0:
        return math.inf
    p, q = true / total, spread / approximated
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())


# Groups of channels ---------------------------------------------------------------------------------------------------


def group_scales(
    weight: Tensor, bits: int, groups: int | None = None, assignment: str = "sorted"
) -> tuple[Tensor, Tensor]:
    r"""Return the scales (``groups``) of the filters of `weight` (``out ...``) and the group of each filter (``out``).

    Channels are sorted by their range and cut into `groups` contiguous groups so that the total squared error
    :math:`\sum_c \lVert W_c - \hat W_c \rVert^2` of symmetric `bits`-bit quantisation is least, each group with the
    best scale of about a hundred: a one-dimensional optimal partition by dynamic programming, :math:`O(G C^2)`.

    Args:
        groups: 1: one scale a layer; None or the number of filters: one each.
        assignment: ``"sorted"`` as above, ``"contiguous"`` keeps the order of the filters, ``"kmeans"`` clusters the
            logarithms of their ranges.

    Raises `UsageError` for a number of groups or an assignment that cannot be.
    """
    filters = weight.detach().float().flatten(1)
    count = len(filters)
    groups = count if groups is None else groups
    if not 1 <= groups <= count:
        raise UsageError(f"groups = {groups} cannot be: the layer has {count} output channels.")
    if assignment not in get_args(Assignment):
        raise UsageError(f"assignment {assignment!r} is not known.{did_you_mean(assignment, get_args(Assignment))}")
    scales = _candidates(filters, bits)
    errors = _errors(filters, scales, bits)
    ranges = filters.abs().amax(1).numpy()
    if groups == count:
        group = np.arange(count)
    elif assignment == "kmeans":
        group = _kmeans(np.log(np.maximum(ranges, 1e-12)), groups)
    else:
        order = np.argsort(ranges, kind="stable") if assignment == "sorted" else np.arange(count)
        cuts = optimal_partition(_costs(errors[order]), groups)
        group = np.empty(count, dtype=np.int64)
        group[order] = np.repeat(np.arange(groups), np.diff([*cuts, count]))
    sums = np.zeros((groups, len(scales)))
    np.add.at(sums, group, errors)
    return torch.from_numpy(scales[sums.argmin(1)]).float(), torch.from_numpy(group)


def optimal_partition(costs: np.ndarray, groups: int) -> list[int]:
    """Return where each of `groups` contiguous groups starts so that the sum of ``costs[first, last]`` is least."""
    count = len(costs)
    best = costs[0].copy()  # best[j]: first j + 1 items in the groups so far
    starts = [np.zeros(count, dtype=np.int64)]
    for _ in range(1, groups):
        table = np.full((count, count), np.inf)
        # The last group starts at i (1 or later), the others hold what comes before.
        table[1:] = best[:-1, None] + costs[1:]
        starts.append(table.argmin(0))
        best = table.min(0)
    cuts, end = [], count - 1
    for chosen in reversed(starts):
        first = int(chosen[end])
        cuts.append(first)
        end = first - 1
    return cuts[::-1]


def _candidates(filters: Tensor, bits: int) -> np.ndarray:
    highest = 2 ** (bits - 1) - 1
    ranges = filters.abs().amax(1)
    top = float(ranges.max())
    if top == 0:
        return np.array([1.0])
    least = 0.2 * max(float(ranges[ranges > 0].min()), top * 1e-3)
    steps = max(1, math.ceil(math.log(top / least) / math.log(_RATIO)))
    return top / highest * _RATIO ** -np.arange(steps + 1, dtype=np.float64)


def _errors(filters: Tensor, scales: np.ndarray, bits: int) -> np.ndarray:
    highest = 2 ** (bits - 1) - 1
    found = np.empty((len(filters), len(scales)))
    for column, scale in enumerate(scales):
        kept = (filters / float(scale)).round_().clamp_(-highest, highest).mul_(float(scale))
        found[:, column] = kept.sub_(filters).double().square_().sum(1).numpy()
    return found


def _costs(errors: np.ndarray) -> np.ndarray:
    # costs[i, j]: channels i..j with the one scale that serves them best; above the diagonal only.
    count = len(errors)
    sums = np.concatenate([np.zeros((1, errors.shape[1])), errors.cumsum(0)])
    costs = np.full((count, count), np.inf)
    for first in range(count):
        costs[first, first:] = (sums[first + 1 :] - sums[first]).min(1)
    return costs


def _kmeans(values: np.ndarray, groups: int) -> np.ndarray:
    centres = np.quantile(values, (np.arange(groups) + 0.5) / groups)
    for _ in range(50):
        group = np.abs(values[:, None] - centres).argmin(1)
        moved = np.array([values[group == g].mean() if (group == g).any() else centres[g] for g in range(groups)])
        if np.allclose(moved, centres):
            break
        centres = moved
    return np.abs(values[:, None] - centres).argmin(1)
