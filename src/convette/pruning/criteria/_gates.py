"""Gates: one number a unit that multiplies the weights that read it; 1 is the network as it is, 0 is the unit gone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convette.pruning._units import tensors_of
from convette.surgery import ChannelGraph, Group, Member


class Gates:
    """The network as a differentiable function of its units' gates, whatever stands between makers and readers.

    Where nothing with a weight reads a group, what scales it last is multiplied instead. The model's own parameters are
    not touched; with `learning` gradients reach them as well.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, learning: bool = False) -> None:
        self.model, self.learning = model, learning
        self.tensors = tensors_of(model)
        self.members: dict[str, list[tuple[str, Member]]] = {}
        self.sizes: dict[str, int] = {}
        for group in graph.groups:
            found = gated_members(group, self.tensors)
            if not group.size or not found:
                continue
            self.sizes[group.name] = group.size
            for member in found:
                self.members.setdefault(member.parameter, []).append((group.name, member))

    def ones(self) -> dict[str, Tensor]:
        """Return open gates for every group, which require gradients."""
        example = next(iter(self.tensors.values()))
        return {name: torch.ones(size, device=example.device, requires_grad=True) for name, size in self.sizes.items()}

    def __call__(self, gates: Mapping[str, Tensor], images: Any) -> Any:
        """Run the network with `gates` on `images` (a tensor, or a tuple or dict of arguments)."""
        changed = {}
        for name, members in self.members.items():
            weight = self.tensors[name] if self.learning else self.tensors[name].detach()
            for group, member in members:
                weight = weight * along(gates[group].to(weight.dtype), member, weight)
            changed[name] = weight
        if isinstance(images, dict):
            return functional_call(self.model, changed, (), images)
        return functional_call(self.model, changed, images if isinstance(images, tuple) else (images,))


def gated_members(group: Group, tensors: Mapping[str, Tensor]) -> list[Member]:
    """Return the members that scale the units of `group` when multiplied: the readers' weights; where nothing reads it,
    scales and shifts of the norms behind its makers, or the makers themselves where there is no norm."""
    readers = [m for m in group.of("consumer") if tensors[m.parameter].is_floating_point()]
    if readers:
        return readers
    affine = [m for m in group.of("affine") if m.parameter.endswith((".weight", ".bias"))]
    return [m for m in affine or group.of("producer") if tensors[m.parameter].is_floating_point()]


def along(gate: Tensor, member: Member, like: Tensor) -> Tensor:
    """Return the factors of a member's entries, shaped to multiply its parameter `like`: 1 where no unit is."""
    index = member.index.to(like.device)
    values = gate.unsqueeze(1).expand(index.shape).reshape(-1)
    factors = torch.ones(like.shape[member.dim], dtype=like.dtype, device=like.device)
    factors = factors.scatter(0, index.reshape(-1), values)
    return factors.view([-1 if dim == member.dim else 1 for dim in range(like.ndim)])
