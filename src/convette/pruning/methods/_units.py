"""What pruning methods share: which groups they may touch, and rows of optimiser state."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from convette.errors import UsageError
from convette.surgery import ChannelGraph, Group

GROUPS = ("all", "inner")


def groups_of(graph: ChannelGraph, which: str, *, free: bool = False) -> list[Group]:
    """Return the groups to prune: "all", or the "inner" ones, which a single layer makes (no residual streams).

    `free` leaves out groups with constraints on how many units stay.
    """
    found = [group for group in graph.groups if group.size]
    if which == "inner":
        found = [group for group in found if len({m.module for m in group.of("producer")}) == 1]
    if free:
        found = [g for g in found if g.constraints.parts == 1 and g.constraints.multiple_of == 1]
    return found


def check_groups(which: str, method: str) -> None:
    """Raise `UsageError` if `which` is no choice of groups."""
    if which not in GROUPS:
        raise UsageError(f"{method}: groups={which!r} is none of {', '.join(map(repr, GROUPS))}.")


def clear_state(optimizers: Iterable[torch.optim.Optimizer], parameter: Tensor, dim: int, entries: Tensor) -> None:
    """Zero these entries of everything the optimisers remember about `parameter` in its shape."""
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.index_fill_(dim, entries.to(value.device), 0)


def kept_selection(keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the selection of groups that lose something, from which of their units stay (bool)."""
    return {name: mask.nonzero().flatten() for name, mask in keep.items() if not mask.all()}
