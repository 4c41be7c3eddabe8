"""The norm of a unit's producer slices, shared by the magnitude criteria."""

import torch
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean
from convette.pruning._units import finite_scores, sum_over_units, tensors_of, weight_members
from convette.surgery import ChannelGraph


def magnitude(model: nn.Module, graph: ChannelGraph, power: int, aggregate: str, normalise: str) -> dict[str, Tensor]:
    """Score units by the `power`-norm of what produces them; see `l1` and `l2` for the equation and the choices."""
    check_choice("aggregate", aggregate, ("norm", "mean", "max"))
    check_choice("normalise", normalise, ("mean", "max", "none"))
    tensors = tensors_of(model)
    scores = {}
    for group in graph.groups:
        members = weight_members(group, "producer", tensors)
        if not members or group.size == 0:
            continue
        powers = torch.stack(
            [sum_over_units(tensors[m.parameter].detach().float().abs() ** power, m).cpu() for m in members]
        )
        scores[group.name] = normalised(aggregated(powers, power, aggregate), normalise)
    return finite_scores(scores, f"l{power}", graph)


def aggregated(powers: Tensor, power: int, aggregate: str) -> Tensor:
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
