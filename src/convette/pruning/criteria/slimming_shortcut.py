"""Importance gates, for channels of residual streams and of inner layers alike (after Joo, Kim and Kim, ICPR 2020).

Slimming ResNet by Slimming Shortcut prunes the residual stream of a ResNet region by region instead of as one, and
ranks all channels by one learned gate. Reconstructed from its abstract: the gate is this criterion, the regions are the
groups that a network has once `convette.surgery.untie` has un-tied its streams: what a block reads of the stream, and
what it adds to it. It works on tied networks as well.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.cost import WidthCost
from convette.errors import ConvetteError, UsageError
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._gates import Gates
from convette.pruning.criteria._observing import batches_of, scoring
from convette.surgery import ChannelGraph

_TIE_BREAK = 1e-3


def importance_gates(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    strength: float | int = 1.0,
    steps: int = 150,
    learning_rate: float = 1e-2,
    cost: Literal["macs", "parameters", "none"] = "macs",
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by gates learned against their price, everything else frozen.

    .. math:: \min_{g \in [0, 1]} L(g) + \lambda_t \sum_l w_l \sum_u g_{l,u}, \qquad
        s_u = g_u + 10^{-3} \frac{t_u}{\max t}

    g multiplies what reads a unit (1 at the start), w_l is the share of the network's `cost` ("macs", "parameters" or
    "none": all alike) that goes with one unit of group l, :math:`\lambda_t` rises evenly from 0 to `strength`. Adam
    with `learning_rate` makes `steps` steps over the calibration batches, in evaluation mode; t is the mean
    :math:`|g\,\partial L/\partial g|` of the last half, which orders the gates that stayed at 1. Frozen weights are the
    point: neither batch norm nor the next layer can take a gate's scale over, so that gates compare across the network.
    The gates themselves are dropped: pruned networks keep their weights.

    Returns one score in 0..1.001 a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data,
    `StructureError` for scores that are not finite. Costs `steps` forward and backward passes.
    """
    check_values("criterion importance_gates", importance_gates, cost=cost)
    if steps < 1 or strength < 0 or learning_rate <= 0:
        raise UsageError(
            f"criterion importance_gates: steps={steps}, strength={strength} and learning_rate={learning_rate}"
            " must be positive."
        )
    batches = batches_of(calibration, "importance_gates")
    gated = Gates(model, graph)
    prices = unit_prices(model, graph, cost)
    gates = gated.ones()
    optimizer = torch.optim.Adam(gates.values(), lr=learning_rate)
    worth = {name: torch.zeros(size) for name, size in gated.sizes.items()}
    with scoring(model), torch.enable_grad():
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            task = loss(gated(gates, images), labels)
            slopes = torch.autograd.grad(task, list(gates.values()), materialize_grads=True)
            for (name, gate), slope in zip(gates.items(), slopes, strict=True):
                if 2 * step >= steps:
                    worth[name] += (gate * slope).detach().abs().float().cpu()
                gate.grad = slope + strength * (step + 1) / steps * prices[name]
            optimizer.step()
            with torch.no_grad():
                for gate in gates.values():
                    gate.clamp_(0, 1)
    largest = max(float(value.max()) for value in worth.values()) or 1.0
    scores = {name: gate.detach().cpu() + _TIE_BREAK * worth[name] / largest for name, gate in gates.items()}
    return finite_scores(scores, "importance_gates", graph)


def unit_prices(model: nn.Module, graph: ChannelGraph, cost: str) -> dict[str, float]:
    """Return for every group the share of the network's `cost` that goes with one of its units.

    Where the cost of other widths cannot be predicted: the share of the parameters that a unit owns.
    """
    names = {group.name: group.size for group in graph.groups if group.size}
    if cost == "none":
        return dict.fromkeys(names, 1 / max(1, sum(names.values())))
    try:
        widths = WidthCost(model, graph.example, graph)
    except ConvetteError:  # a network whose widths cannot be predicted: what a unit owns is the next best
        return _owned(model, graph)
    price = widths.macs if cost == "macs" else widths.parameters
    whole = float(price({}))
    least = {name: max(1, graph[name].constraints.parts, graph[name].constraints.multiple_of) for name in names}
    return {
        name: (whole - float(price({name: _without_last(graph, name, least[name])}))) / whole / least[name]
        if size > least[name]
        else 0.0
        for name, size in names.items()
    }


def _owned(model: nn.Module, graph: ChannelGraph) -> dict[str, float]:
    """Return for every group the share of the parameters that one of its units owns."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    total = sum(tensor.numel() for tensor in model.parameters())
    return {
        group.name: sum(
            tensors[m.parameter].numel() / tensors[m.parameter].shape[m.dim] * m.index.shape[1]
            for m in group.members
            if m.parameter in tensors
        )
        / total
        for group in graph.groups
        if group.size
    }


def _without_last(graph: ChannelGraph, name: str, count: int) -> Tensor:
    """Return a legal selection of the group with `count` units fewer: the last of each part."""
    group = graph[name]
    each = group.size // group.constraints.parts
    gone = count // group.constraints.parts
    units = torch.arange(group.size).view(group.constraints.parts, each)
    return units[:, : each - gone].flatten()
