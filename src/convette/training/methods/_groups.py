"""Parameters that are trained at a rate, or with a weight decay, of their own."""

from collections.abc import Iterable

import torch
from torch import nn


def split_group(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], role: str) -> None:
    """Move `parameters` into a group of `optimizer` of their own, named by its key ``"role"``, without weight decay.

    Their optimiser state stays. Calling it again changes nothing. A checkpoint keeps the group with its name.
    """
    wanted = {id(parameter) for parameter in parameters}
    moved: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        if group.get("role") == role:
            wanted -= {id(parameter) for parameter in group["params"]}
    for group in optimizer.param_groups:
        if group.get("role") != role:
            moved += [parameter for parameter in group["params"] if id(parameter) in wanted]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
    if moved:
        like = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "role")}
        optimizer.param_groups.append({**like, "params": moved, "weight_decay": 0.0, "role": role})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def scale_rate(optimizer: torch.optim.Optimizer, role: str, factor: float) -> None:
    """Multiply the learning rate of the group `role`; the trainer sets all rates anew before each step."""
    for group in optimizer.param_groups:
        if group.get("role") == role:
            group["lr"] *= factor
