"""Loss increase: what the loss really loses with a unit, measured unit by unit."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.pruning._units import finite_scores, sum_over_units, tensors_of
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.surgery import ChannelGraph, Group, masked


def loss_increase(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    candidates: float | int = 1.0,
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by how much the loss on the calibration data rises without each of them.

    .. math:: s_u = L(D;\, u \text{ zeroed}) - L(D)

    Negative where the network does better without the unit, 0 where nothing reads it. `candidates` below 1 measures
    only that share of each group, the units whose readers' weights are smallest in norm (what a sparse regulariser has
    emptied); the others rank above them by that norm.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for losses that are not finite. Costs a forward pass over the calibration data a unit: some hundred units and
    images, not a ResNet-50. Source: Mitsuno and Kurita, arXiv 2011.02389.
    """
    if not 0 < candidates <= 1:
        raise UsageError(f"criterion loss_increase: candidates={candidates}: a share above 0 and up to 1 is needed.")
    batches = batches_of(calibration, "loss_increase")
    tensors = tensors_of(model)
    scores = {}
    with scoring(model), torch.no_grad():
        whole = _mean_loss(model, batches, loss)
        for group in graph.groups:
            if not group.size:
                continue
            norms = _reading(group, tensors)
            measured = norms.argsort(stable=True)[: max(1, round(candidates * group.size))]
            found = torch.zeros(group.size, dtype=torch.float64)
            for unit in measured.tolist():
                found[unit] = loss_without(model, graph, group, unit, batches, loss) - whole
            rest = torch.ones(group.size, dtype=torch.bool)
            rest[measured] = False
            if rest.any():
                found[rest] = found[measured].amax() + 1e-6 + norms[rest].double()
            scores[group.name] = found
    return finite_scores(scores, "loss_increase", graph)


def loss_without(
    model: nn.Module, graph: ChannelGraph, group: Group, unit: int, batches: Sequence[Any], loss: Callable
) -> float:
    """Return the mean loss over `batches` of `model` (in eval mode) with one unit zeroed."""
    kept = torch.ones(group.size, dtype=torch.bool)
    kept[unit] = False
    with zeroed(model, graph, group, kept):
        return _mean_loss(model, batches, loss)


def zeroed(model: nn.Module, graph: ChannelGraph, group: Group, kept: Tensor) -> Any:
    """Return a context in which the units of `group` that are not `kept` (bool) are zeroed wherever they are used."""
    # A group that must keep more than it would (heads, equal parts) cannot be masked as a legal selection.
    parts = group.constraints.parts
    legal = int(kept.sum()) >= group.constraints.minimum and parts == 1 and group.constraints.multiple_of == 1
    if legal:
        return masked(model, graph, {group.name: kept.nonzero().flatten()})
    return _Zeroed(model, group, ~kept)


class _Zeroed:
    """Zero some units of one group wherever they are made or read, whatever its constraints say."""

    def __init__(self, model: nn.Module, group: Group, gone: Tensor) -> None:
        self.tensors, self.group, self.gone = tensors_of(model), group, gone
        self.saved: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        for member in self.group.members:
            tensor = self.tensors[member.parameter]
            if tensor.is_floating_point() and not member.parameter.endswith("running_var"):
                self.saved.append((tensor, tensor.detach().clone()))
                index = member.index[self.gone].flatten().to(tensor.device)
                with torch.no_grad():
                    tensor.index_fill_(member.dim, index, 0)

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for tensor, values in reversed(self.saved):
                tensor.copy_(values)


def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Callable) -> float:
    total = sum(float(loss(run(model, images), labels)) * len(labels) for images, labels in batches)
    return total / sum(len(labels) for _, labels in batches)


def _reading(group: Group, tensors: dict[str, Tensor]) -> Tensor:
    """Return the norm of all weights that read each unit; of those that make it where nothing reads it."""
    members = group.of("consumer") or group.of("producer")
    squares = [sum_over_units(tensors[m.parameter].detach().float() ** 2, m).cpu() for m in members]
    return torch.stack(squares).sum(dim=0).sqrt() if squares else torch.zeros(group.size)
