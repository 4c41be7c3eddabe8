"""Change by gradient: how much a unit's weights would still move (Nguyen-Meidine et al., arXiv 1906.08746)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, sum_over_units, tensors_of
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def grad_change(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    mode: Literal["accumulate", "per_batch"] = "accumulate",
    normalise: Literal["mean", "max", "none"] = "mean",
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the gradients of the weights that make them.

    .. math:: s_u = \Bigl\lVert \sum_b \frac{\partial L_b}{\partial W_u} \Bigr\rVert_1 \quad\text{or}\quad
        \sum_b \Bigl\lVert \frac{\partial L_b}{\partial W_u} \Bigr\rVert_1

    over batches b at fixed weights, in evaluation mode: ``mode="accumulate"`` (PGP, default; gradients that point both
    ways cancel) or ``mode="per_batch"`` (RPGP). Units that still learn are kept; for pruning in training, where
    `ProgressiveGradientPruning` uses it: on a network that has converged small gradients say little. `normalise`
    divides by the group's mean (default), its maximum, or nothing.

    Returns one score a unit for every group with producer weights, CPU float32, larger = keep. Raises `UsageError`
    without calibration data, `StructureError` for gradients that are not finite. Costs a forward and backward pass a
    batch. Source: arXiv 1906.08746.
    """
    check_values("criterion grad_change", grad_change, mode=mode, normalise=normalise)
    tensors = tensors_of(model)
    names = made_by(graph, tensors)
    weights = [tensors[name] for name in names]
    totals = {name: torch.zeros_like(weight) for name, weight in zip(names, weights, strict=True)}
    with scoring(model), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in batches_of(calibration, "grad_change"):
            slopes = torch.autograd.grad(loss(run(model, images), labels), weights, materialize_grads=True)
            for name, slope in zip(names, slopes, strict=True):
                totals[name] += slope.abs() if mode == "per_batch" else slope
    scores = {name: normalised(score, normalise) for name, score in sums_of_units(graph, totals).items()}
    return finite_scores(scores, "grad_change", graph)


def made_by(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights (two dimensions or more) that make removable units."""
    producers = {member.parameter for group in graph.groups for member in group.of("producer")}
    return sorted(name for name in producers if tensors[name].ndim > 1)


def sums_of_units(graph: ChannelGraph, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the absolute `gradients` (by parameter) over what makes each unit, of all groups."""
    found = {}
    for group in graph.groups:
        members = [member for member in group.of("producer") if member.parameter in gradients]
        if members and group.size:
            each = [sum_over_units(gradients[m.parameter].abs().float(), m).cpu() for m in members]
            found[group.name] = torch.stack(each).sum(dim=0)
    return found
