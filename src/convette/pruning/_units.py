"""What every criterion does alike: reach a group's tensors, sum them over units, refuse scores that are no numbers."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import StructureError
from convette.surgery import ChannelGraph, Group, Member

# A score per unit for every group that was scored; larger = keep. Sizes differ between groups, hence "_".
Scores: TypeAlias = Mapping[str, Float[Tensor, " _"]]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of `model` by the names that `Member.parameter` uses (shared ones too)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def sum_over_units(values: Tensor, member: Member) -> Tensor:
    """Sum `values` (shaped like the member's parameter) over the entries that each unit owns: one number a unit."""
    others = [dim for dim in range(values.ndim) if dim != member.dim]
    along = values.sum(dim=others) if others else values
    return along[member.index.to(values.device)].sum(dim=1)


def weight_members(group: Group, role: str, tensors: Mapping[str, Tensor]) -> list[Member]:
    """Return the members of `group` in `role` that are weights (two or more dimensions), else all in that role.

    One-dimensional producers are biases: they say how much a unit is shifted, not how much it listens. Units that only
    pick channels from an un-tied stream have no producers: what reads them stands in.
    """
    made = any(member.role == "producer" for member in group.members)
    role = "consumer" if role == "producer" and not made else role
    members = [member for member in group.members if member.role == role]
    weights = [member for member in members if tensors[member.parameter].ndim > 1]
    return weights or members


def check_finite(model: nn.Module) -> None:
    """Raise `StructureError` naming the first parameter, or statistic of a batch norm, that holds NaN or infinity."""
    statistics = {n: b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    for name, tensor in {**dict(model.named_parameters()), **statistics}.items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise StructureError(
                f"prune: {bad} of the {tensor.numel()} values of {name} are not finite: this network cannot be pruned."
                " Take a checkpoint from before they broke, or train again with a lower learning rate or in fp32."
            )


def flat_groups(scores: Mapping[str, Tensor]) -> list[str]:
    """Return the groups whose units are all worth the same, to the last bit."""
    return [name for name, score in scores.items() if len(score) > 1 and bool((score == score[0]).all())]


def finite_scores(scores: Mapping[str, Tensor], criterion: str, graph: ChannelGraph) -> dict[str, Tensor]:
    """Return `scores` on the CPU in float32, each of the group's size.

    Raises `StructureError` naming criterion, group and unit if a score is NaN or infinite.
    """
    sizes = {group.name: group.size for group in graph.groups}
    checked = {}
    for name, score in scores.items():
        score = score.detach().to("cpu", torch.float32)
        bad = (~torch.isfinite(score)).nonzero().flatten()
        if len(bad):
            raise StructureError(
                f"criterion {criterion}: the score of unit {int(bad[0])} of {name} is {float(score[bad[0]])}"
                f" ({len(bad)} of {sizes[name]} units): its weights or gradients are not finite. Look for the step that"
                " broke them (learning rate, precision), or score with calibration images the network can handle."
            )
        checked[name] = score
    return checked
