"""Exponential moving average of a network."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convette.training.distributed import broadcast_tensors


class Ema:
    r"""A copy of a network that follows it slowly, weights and buffers alike.

    .. math:: \bar w \leftarrow d\,\bar w + (1 - d)\,w, \qquad d = \min(\text{decay}, \tfrac{1 + t}{10 + t})

    with t the updates so far: the average starts close to the network and becomes longer. Integer buffers (counters)
    are copied. Costs one copy of the network and one pass over its weights a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.rebuild(model)

    def rebuild(self, model: nn.Module) -> None:
        """Pair the tensors of the copy with those of `model` again, after either was edited."""
        self.module.requires_grad_(False).eval()
        ours = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        pairs = [(ours[name], tensor) for name, tensor in theirs.items()]
        self._averages = [a for a, b in pairs if b.is_floating_point()]
        self._sources = [b for _, b in pairs if b.is_floating_point()]
        self._counters = [(a, b) for a, b in pairs if not b.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the network."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)
        for ours, theirs in self._counters:
            ours.copy_(theirs)

    def synchronise(self) -> None:
        """Take rank 0's buffers on all ranks: each averaged its own batch statistics."""
        broadcast_tensors([*self.module.buffers()])

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors and the number of updates."""
        tensors: dict[str, Tensor] = dict(self.module.state_dict())
        return {"updates": self.updates, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.updates = int(state["updates"])
        self.module.load_state_dict(state["tensors"], strict=True)
