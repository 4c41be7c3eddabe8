"""First-order Taylor estimate of what the loss loses with a unit."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._watching import in_eval, keeping_gradients
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, sum_over_units, tensors_of, weight_members
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph, Member


def taylor(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    role: Literal["consumer", "producer"] = "consumer",
    normalise: Literal["mean", "max", "none"] = "none",
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the first-order change of the loss when they go.

    .. math:: s_u = \frac{1}{B} \sum_{b=1}^{B} \Bigl| \sum_{w \in W_u} \frac{\partial L_b}{\partial w}\, w \Bigr|

    over B calibration batches, L_b the mean `loss` of batch b in evaluation mode, W_u the weights that read unit u. To
    remove a unit is to set these weights to zero, so the inner sum is the exact first-order term of what the edit does,
    whatever stands between the producers and the readers (batch norm, activation, a residual stream).
    ``role="producer"`` sums over the weights that make the unit instead. `normalise` divides by the group's mean or
    maximum; the default leaves the scores in units of the loss, comparable across the network.

    `calibration` yields ``(images, labels)``, ready for ``loss(model(images), labels)``. The model's gradients and
    training flags are left as they were. Returns one score a unit for every group with such weights, CPU float32.
    Raises `UsageError` without calibration data, `StructureError` for scores that are not finite. Costs one forward
    and backward pass a batch. Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv
    1906.10771.
    """
    check_values("criterion taylor", taylor, role=role, normalise=normalise)
    tensors = tensors_of(model)
    members = {group.name: _readers(group, role, tensors) for group in graph.groups if group.size}
    members = {name: found for name, found in members.items() if found}
    names = sorted({member.parameter for found in members.values() for member in found})
    totals: dict[str, Tensor] = {}
    images_seen = 0
    for products, count in _weighted_gradients(model, calibration, names, tensors, loss):
        images_seen += count
        for name, found in members.items():
            change = torch.stack([sum_over_units(products[m.parameter], m) for m in found]).sum(dim=0).abs()
            totals[name] = totals[name] + change * count if name in totals else change * count
    if not images_seen:
        raise UsageError(
            "criterion taylor needs calibration images and labels: give a data set, or use l1, l2 or lamp."
        )
    scores = {name: normalised(total / images_seen, normalise) for name, total in totals.items()}
    return finite_scores(scores, "taylor", graph)


def _readers(group, role: str, tensors: dict[str, Tensor]) -> list[Member]:
    members = [m for m in group.members if m.role == role] or weight_members(group, "producer", tensors)
    return [m for m in members if tensors[m.parameter].is_floating_point()]


def _weighted_gradients(model, calibration, names, tensors, loss):
    """Yield, for every batch, gradient times weight by parameter name, and the number of images."""
    weights = [tensors[name] for name in names]
    with in_eval(model), keeping_gradients(weights):
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in calibration or ():
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model(images), labels), weights, allow_unused=True)
            products = [
                torch.zeros_like(weight) if gradient is None else gradient.detach() * weight.detach()
                for gradient, weight in zip(gradients, weights, strict=True)
            ]
            yield dict(zip(names, products, strict=True)), len(labels)
