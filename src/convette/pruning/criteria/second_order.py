"""Second-order Taylor estimate of what the loss loses with a unit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.pruning._units import finite_scores
from convette.pruning.criteria._gates import Gates
from convette.pruning.criteria._observing import batches_of, scoring
from convette.surgery import ChannelGraph


def second_order(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    probes: int = 8,
    exact: bool = False,
    signed: bool = False,
    seed: int = 0,
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the second-order change of the loss when their gate closes.

    .. math:: \Delta_u = -\frac{\partial L}{\partial g_u} + \frac12 \frac{\partial^2 L}{\partial g_u^2}, \qquad
        s_u = |\Delta_u|

    with L the mean `loss` over the calibration data, g_u a gate on all that reads unit u, at 1. The diagonal of the
    Hessian of the gates is estimated by Hutchinson's :math:`E[z \odot Hz]` with `probes` vectors of random signs, or
    with `exact` taken unit by unit. `signed` keeps the sign: what is predicted to help goes first.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for scores that are not finite. Costs a backward pass through the backward pass a batch and probe (`exact`: and
    unit). Source: LeCun et al., Optimal Brain Damage, 1989, with the gates of Molchanov et al., arXiv 1906.10771.
    """
    gated = Gates(model, graph)
    generator = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros(size, dtype=torch.float64) for name, size in gated.sizes.items()}
    images_seen = 0
    with scoring(model), torch.enable_grad():
        for images, labels in batches_of(calibration, "second_order"):
            gates = gated.ones()
            names, values = list(gates), list(gates.values())
            total = loss(gated(gates, images), labels)
            first = torch.autograd.grad(total, values, create_graph=True, materialize_grads=True)
            second = _exact(first, values) if exact else _hutchinson(first, values, probes, generator)
            for name, slope, bend in zip(names, first, second, strict=True):
                totals[name] += (-slope.detach() + bend / 2).double().cpu() * len(labels)
            images_seen += len(labels)
    scores = {name: total / images_seen for name, total in totals.items()}
    return finite_scores({n: s if signed else s.abs() for n, s in scores.items()}, "second_order", graph)


def _hutchinson(first: Any, values: list[Tensor], probes: int, generator: torch.Generator) -> list[Tensor]:
    sums = [torch.zeros_like(value) for value in values]
    for _ in range(max(1, probes)):
        signs = [(torch.randint(0, 2, v.shape, generator=generator) * 2.0 - 1).to(v) for v in values]
        projected = sum((slope * sign).sum() for slope, sign in zip(first, signs, strict=True))
        for one, sign, bend in zip(sums, signs, _derivative(projected, values), strict=True):
            one += sign * bend / max(1, probes)
    return sums


def _exact(first: Any, values: list[Tensor]) -> list[Tensor]:
    found = []
    for slope, value in zip(first, values, strict=True):
        found.append(torch.stack([_derivative(one, [value])[0][u] for u, one in enumerate(slope)]))
    return found


def _derivative(of: Any, by: list[Tensor]) -> list[Tensor]:
    if not of.requires_grad:  # the slopes are constant: a network that is linear in its gates
        return [torch.zeros_like(value) for value in by]
    return list(torch.autograd.grad(of, by, retain_graph=True, materialize_grads=True))
