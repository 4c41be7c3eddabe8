"""Group norm: the magnitude of everything a unit owns, in every layer it passes through."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, sum_over_units, tensors_of
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def group_norm(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the L2 norm of all their parameters: what makes them, scales them and reads them.

    .. math:: s_u = \Bigl(\sum_{m} \lVert \theta_{m,u} \rVert_2^2\Bigr)^{1/2}

    over every weight, bias and norm scale m that holds a slice of unit u (running statistics do not count).
    `normalise` divides by the group's mean (default), its maximum, or nothing.

    Returns one score a unit, CPU float32, larger = keep. Raises `StructureError` for a weight that is not finite. Costs
    one pass over the weights; needs no data (`calibration` is ignored). Source: Fang et al., DepGraph: Towards Any
    Structural Pruning, arXiv 2301.12900.
    """
    check_values("criterion group_norm", group_norm, normalise=normalise)
    tensors = tensors_of(model)
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    scores = {}
    for group in graph.groups:
        members = [m for m in group.members if m.parameter in learned]
        if members and group.size:
            squares = [sum_over_units(tensors[m.parameter].detach().float() ** 2, m).cpu() for m in members]
            scores[group.name] = normalised(torch.stack(squares).sum(dim=0).sqrt(), normalise)
    return finite_scores(scores, "group_norm", graph)
