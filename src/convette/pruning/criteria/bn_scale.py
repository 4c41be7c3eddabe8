"""The scale that normalisation gives to a unit."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, sum_over_units, tensors_of
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph, Member

_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scales: scales.mean(dim=0),
    "max": lambda scales: scales.amax(dim=0),
    "min": lambda scales: scales.amin(dim=0),
    "sum": lambda scales: scales.sum(dim=0),
}


def bn_scale(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "none",
    reduce: Literal["mean", "max", "min", "sum"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the scale of their normalisation layers.

    .. math:: s_u = \frac{1}{|M|} \sum_{m \in M} |\gamma_{m,u}|

    over the normalisation layers M of the group (batch, group, layer or instance norm with a learned scale). `reduce`
    says how those of a residual stream meet: their "mean" (default), "max" (a unit stays if any layer needs it), "min"
    (it goes if any layer does not), or "sum".
    `normalise` divides by the group's mean or maximum; the default compares the plain scales across the network. Groups
    without such a layer get no score, which leaves them untouched. The criterion means most after training with a
    penalty on gamma.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` if no group has a normalisation scale,
    `StructureError` for a scale that is NaN or infinite. Costs next to nothing; needs no data (`calibration` is
    ignored). Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv 1708.06519.
    """
    check_values("criterion bn_scale", bn_scale, normalise=normalise, reduce=reduce)
    tensors = tensors_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    scores = {}
    for group in graph.groups:
        scales = [
            sum_over_units(tensors[m.parameter].detach().float().abs(), m).cpu()
            for m in group.members
            if _is_scale(m, modules)
        ]
        if scales and group.size:
            scores[group.name] = normalised(_REDUCED[reduce](torch.stack(scales)), normalise)
    if not scores:
        raise UsageError(
            "criterion bn_scale: no group of this network has a normalisation layer with a scale; use l2 or taylor."
        )
    return finite_scores(scores, "bn_scale", graph)


def _is_scale(member: Member, modules: dict[str, nn.Module]) -> bool:
    # Other per-channel scales (layer scale, PReLU slopes) share the role "affine" but normalise nothing.
    kind = type(modules[member.module]).__name__.lower() if member.module in modules else ""
    return member.role == "affine" and member.parameter.endswith("weight") and "norm" in kind
