"""Magnitude: the norm of the weights that produce a unit; `l1` and `l2` differ in the power only."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, sum_over_units, tensors_of, weight_members
from convette.surgery import ChannelGraph


def l1(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    aggregate: Literal["norm", "mean", "max"] = "norm",
    normalise: Literal["mean", "max", "none"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the L1 norm of their producer weights.

    .. math:: n_{m,u} = \sum |w_{m,u}|,\qquad s_u = \frac{a_u}{\operatorname{mean}_v a_v}

    where :math:`w_{m,u}` is the slice of producer weight m (the rows of a convolution or linear layer) that makes unit
    u and :math:`a_u` merges the members m of a group, for instance all the layers that add to one residual stream:

    - ``aggregate="norm"`` (default): the L1 norm of all slices taken as one vector; layers with large weights speak
      louder;
    - ``aggregate="mean"``: the mean of :math:`n_{m,u} / \operatorname{mean}_v n_{m,v}`: every layer has equal say;
    - ``aggregate="max"``: the largest of those: a unit stays if one layer needs it.

    `normalise` divides by the group's mean (default: groups compare by relative size), its maximum, or nothing.
    Biases and batch-norm scales do not count. Groups without producers get no score, which leaves them untouched.

    Returns one score a unit for every scored group, CPU float32, larger = keep; a unit without weights scores 0.
    Raises `StructureError` for a weight that is NaN or infinite, `UsageError` for an unknown option.
    Costs one pass over the weights; needs no data (`calibration` is ignored). Source: Li et al., Pruning Filters for
    Efficient ConvNets, arXiv 1608.08710.
    """
    return _magnitude(model, graph, 1, aggregate, normalise)


def l2(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    aggregate: Literal["norm", "mean", "max"] = "norm",
    normalise: Literal["mean", "max", "none"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the L2 norm of their producer weights.

    .. math:: n_{m,u} = \Bigl(\sum w_{m,u}^2\Bigr)^{1/2},\qquad s_u = \frac{a_u}{\operatorname{mean}_v a_v}

    The rest is as in `l1`. Source: He et al., Soft Filter Pruning, arXiv 1808.06866 (the norm; pruning hard here).
    """
    return _magnitude(model, graph, 2, aggregate, normalise)


def _magnitude(model: nn.Module, graph: ChannelGraph, power: int, aggregate: str, normalise: str) -> dict[str, Tensor]:
    """Score units by the `power`-norm of what produces them; see `l1`."""
    check_values(f"criterion l{power}", l1, aggregate=aggregate, normalise=normalise)
    tensors = tensors_of(model)
    scores = {}
    for group in graph.groups:
        members = weight_members(group, "producer", tensors)
        if not members or group.size == 0:
            continue
        powers = torch.stack(
            [sum_over_units(tensors[m.parameter].detach().float().abs() ** power, m).cpu() for m in members]
        )
        scores[group.name] = normalised(_aggregated(powers, power, aggregate), normalise)
    return finite_scores(scores, f"l{power}", graph)


def _aggregated(powers: Tensor, power: int, aggregate: str) -> Tensor:
    """Merge the members' sums of powers (members x units) to one number a unit."""
    if aggregate == "norm":
        return powers.sum(dim=0) ** (1 / power)
    norms = powers ** (1 / power)
    equal_say = norms / norms.mean(dim=1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    return equal_say.mean(dim=0) if aggregate == "mean" else equal_say.amax(dim=0)


def normalised(score: Tensor, normalise: str) -> Tensor:
    """Divide by the group's mean or maximum; a group of zeros stays zero."""
    if normalise == "none":
        return score
    scale = score.mean() if normalise == "mean" else score.amax()
    return score / scale.clamp_min(torch.finfo(score.dtype).tiny)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UsageError` if `value` is none of `choices`."""
    if value not in choices:
        raise UsageError(f"criterion option {option}={value!r} is unknown.{did_you_mean(value, choices)}")
