"""Groups of units: which slices of which parameters go together, gathered from the labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from convette.surgery._grouping import Grouping
from convette.surgery._labels import LabelStore


@dataclass(frozen=True)
class Constraints:
    """What a selection of units must respect: at least `minimum` kept, a count divisible by `multiple_of` (or all),
    and as many kept in each of `parts` equal stretches.

    Counted in units. Grouped convolutions, group norms and shuffles need no `parts`: one unit of theirs holds a channel
    of each part already. What the user asks for (`ChannelGraph.constrain`) is added here.
    """

    parts: int = 1
    minimum: int = 1
    multiple_of: int = 1


@dataclass(frozen=True)
class Member:
    """What the units of a group own in one dimension of one parameter or buffer.

    Unit u owns the entries ``index[u]`` along `dim` of `parameter`. `role`: "producer" (rows that compute the
    channel), "consumer" (columns that read it), "affine" (one value a channel: norms, scales, statistics) or "index"
    (the place of the channel in an un-tied stream).
    """

    parameter: str
    dim: int
    index: Tensor
    role: str
    module: str


@dataclass(frozen=True)
class Group:
    """Units of one make: `size` sets of channels, each removed whole or not at all."""

    name: str
    size: int
    members: tuple[Member, ...]
    constraints: Constraints

    def of(self, role: str) -> tuple[Member, ...]:
        """Return the members with a role."""
        return tuple(member for member in self.members if member.role == role)


def build_groups(store: LabelStore, roots: np.ndarray) -> tuple[tuple[Group, ...], dict[str, Tensor]]:
    """Gather units (labels with one root) into groups of one make; return them and the roots of their units."""
    found = Grouping(store, roots)
    groups = [_LazyGroup(name, len(found.units[name]), found, Constraints()) for name in found.names]
    return tuple(groups), found.units


class _LazyGroup(Group):
    """A group whose members are gathered when they are first asked for: most uses need few of them."""

    def __init__(
        self, name: str, size: int, members: "tuple[Member, ...] | Grouping", constraints: Constraints
    ) -> None:
        own = vars(self)
        own.update(name=name, size=size, constraints=constraints)
        own["members" if isinstance(members, tuple) else "_found"] = members

    def __getattr__(self, name: str) -> Any:
        found = vars(self).get("_found")
        if name != "members" or found is None:
            raise AttributeError(name)
        members = vars(self)["members"] = tuple(
            Member(slot.parameter, slot.dim, index, slot.role, slot.module) for slot, index in found.members(self.name)
        )
        return members
