"""What every shrink of one traced network has in common, worked out once: only the indices that stay are new."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.surgery._attributes import Attributes, HeldSizes, Slot
from convette.surgery._edits import Rewrite
from convette.surgery._records import SizeCall
from convette.surgery._sizes import Vectors
from convette.surgery._walk import Walk

if TYPE_CHECKING:
    from convette.surgery._graph import ChannelGraph

_MOST_KNOWN = 32


def plan_of(graph: "ChannelGraph") -> "Plan":
    """Return the plan of `graph`, made when it is first asked for: while its network is as it was traced."""
    plan = vars(graph).get("_plan")
    if plan is None:
        plan = vars(graph)["_plan"] = Plan(graph)
    return plan


class Cut:
    """What stays of each list of channels: `indices` and, as whole numbers, `counts` and the `last` of each."""

    def __init__(self, plan: "Plan", keep: Tensor) -> None:
        """`keep`: whether each root stays."""
        stays = keep.numpy()[plan.roots]
        found = np.flatnonzero(stays)
        edges = np.searchsorted(found, plan.ends)
        counts = np.diff(edges, prepend=0)
        places = torch.from_numpy(found - np.repeat(plan.starts, counts))
        self.counts: list[int] = counts.tolist()
        self.indices: tuple[Tensor, ...] = places.split(self.counts)
        self.last: list[int] = places[torch.from_numpy(edges - 1)].tolist() if len(found) else [-1] * len(counts)
        self.short = [count < size for count, size in zip(self.counts, plan.sizes, strict=True)]


class Plan:
    """Which lists of channels there are, which slots keep to each, and which attributes follow from their lengths.

    `slots`: (parameter, dimension) and the number of its list; `groups`: modules and the list of their groups;
    `items`: calls whose sizes nothing else takes care of; `held`: sizes that modules hold; `known`: what was found to
    make a network run at certain sizes, by these sizes.
    """

    def __init__(self, graph: "ChannelGraph") -> None:
        """Make the plan from a graph and its network as it was traced."""
        walk = Walk(graph.model)
        lists = _Lists()
        roots = graph.roots.numpy()
        self.slots: list[tuple[Slot, int]] = []
        numbers: dict[int, int] = {}
        for slot in graph.slots():
            number = numbers.get(id(slot.labels))
            if number is None:
                number = numbers[id(slot.labels)] = lists.number(roots[slot.labels.numpy()])
            if number >= 0:
                self.slots.append(((slot.parameter, slot.dim), number))
        self.groups: list[tuple[str, int]] = []
        self.items: list[SizeCall] = []
        for item in [*graph.records.sizes, *graph.records.scalars.values()]:
            if item.kind == "groups":
                self.groups.append((item.module, lists.number(roots[item.given[1].numpy()])))
            if not follows(walk.module(item.module), item):
                self.items.append(item)
        self.sizes = [len(found) for found in lists.found]
        self.ends = np.cumsum(self.sizes, dtype=np.int64)
        self.starts = self.ends - self.sizes
        self.roots = np.concatenate(lists.found) if lists.found else np.zeros(0, dtype=np.int64)
        self.held = HeldSizes(walk, [slot for slot, _ in self.slots])
        self.vectors = Vectors(graph.roots)
        self.known: dict[Hashable, tuple[Attributes, tuple[Rewrite, ...]]] = {}

    def kept(self, cut: Cut) -> tuple[dict[Slot, Tensor], dict[Slot, int]]:
        """Return the indices that stay of every slot that becomes shorter, and how many they are.

        Raises `StructureError` where none are.
        """
        short, indices, counts = cut.short, cut.indices, cut.counts
        kept, lengths = {}, {}
        for slot, number in self.slots:
            if short[number]:
                if not counts[number]:
                    raise StructureError(f"nothing would be left of {slot[0]!r}.")
                kept[slot] = indices[number]
                lengths[slot] = counts[number]
        return kept, lengths

    def new_groups(self, cut: Cut) -> dict[str, int]:
        """Return how many groups each grouped convolution or normalisation has left, by module."""
        return {module: cut.counts[number] for module, number in self.groups if number >= 0 and cut.short[number]}

    def remember(self, key: Hashable, attributes: Attributes, rewrites: tuple[Rewrite, ...]) -> None:
        """Note with which attributes and rewrites the network ran at the sizes that `key` stands for."""
        if len(self.known) >= _MOST_KNOWN:
            self.known.pop(next(iter(self.known)))
        self.known[key] = (attributes, rewrites)


class _Lists:
    """Lists of roots, each different one once; those that nothing can be removed of are left out."""

    def __init__(self) -> None:
        self.found: list[np.ndarray] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, roots: np.ndarray) -> int:
        """Return the number of a list, -1 where all of it is fixed."""
        number = self._numbers.get(key := roots.tobytes())
        if number is None:
            number = self._numbers[key] = len(self.found) if roots.any() else -1
            if number >= 0:
                self.found.append(roots)
        return number


def follows(module: nn.Module, item: SizeCall) -> bool:
    """Tell whether the size in a call of `module` comes from an attribute that `HeldSizes` takes care of."""
    if item.kind == "groups":
        return isinstance(module, _ConvNd | nn.GroupNorm)
    if item.kind == "normalized_shape":
        return isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None
    if item.kind == "shape" and item.name == "zeros":
        return type(module) in (nn.LSTM, nn.GRU, nn.RNN)  # the state they start from, by `hidden_size`
    return False


def as_key(cut: Cut, items: Mapping[int, tuple[SizeCall, Any]]) -> Hashable:
    """Return what tells cuts apart that leave other sizes: all shapes and all sizes in Python follow from it."""
    return tuple(cut.counts), tuple((call, sizes) for call, (_, sizes) in items.items())
