"""Hessian trace: how sharply the loss bends along the weights of a unit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.pruning._units import finite_scores, sum_over_units, tensors_of, weight_members
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.surgery import ChannelGraph


def hessian_trace(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    probes: int = 4,
    seed: int = 0,
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the trace of the Hessian over the weights that make them, times their squared norm.

    .. math:: s_u = \Bigl|\frac{\operatorname{tr} H_u}{2 p_u}\Bigr| \lVert w_u \rVert_2^2, \qquad
        \operatorname{tr} H_u \approx \frac1K \sum_{k=1}^{K} z_{k,u}^\top (H z_k)_u

    H the Hessian of the mean `loss` on the calibration data by the producer weights w_u (p_u of them) of unit u, and
    z_k one of `probes` vectors of random signs (Hutchinson).

    Returns one score a unit for every group with producers, CPU float32, larger = keep. Raises `UsageError` without
    calibration data, `StructureError` for scores that are not finite. Costs a backward pass through the backward pass a
    batch and probe. Source: Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, arXiv 2101.08940.
    """
    tensors = tensors_of(model)
    members = {group.name: weight_members(group, "producer", tensors) for group in graph.groups if group.size}
    members = {name: found for name, found in members.items() if found}
    names = sorted({member.parameter for found in members.values() for member in found})
    weights = [tensors[name] for name in names]
    traces = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in zip(names, weights, strict=True)}
    generator = torch.Generator().manual_seed(seed)
    images_seen = 0
    with scoring(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in batches_of(calibration, "hessian_trace"):
            total = loss(run(model, images), labels)
            slopes = torch.autograd.grad(total, weights, create_graph=True, materialize_grads=True)
            for _ in range(max(1, probes)):
                signs = [(torch.randint(0, 2, w.shape, generator=generator) * 2.0 - 1).to(w) for w in weights]
                projected = torch.stack([(s * z).sum() for s, z in zip(slopes, signs, strict=True)]).sum()
                bends = torch.autograd.grad(projected, weights, retain_graph=True, materialize_grads=True)
                for name, sign, bend in zip(names, signs, bends, strict=True):
                    traces[name] += (sign * bend).detach() * (len(labels) / max(1, probes))
            images_seen += len(labels)
    scores = {}
    for group, found in members.items():
        trace = torch.stack([sum_over_units(traces[m.parameter], m).cpu() for m in found]).sum(dim=0) / images_seen
        square = torch.stack([sum_over_units(tensors[m.parameter].detach() ** 2, m).cpu() for m in found]).sum(dim=0)
        entries = sum(tensors[m.parameter].select(m.dim, 0).numel() * m.index.shape[1] for m in found)
        scores[group] = (trace / (2 * entries)).abs() * square
    return finite_scores(scores, "hessian_trace", graph)
