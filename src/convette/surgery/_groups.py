"""Groups of units: which slices of which parameters go together, gathered from the labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convette.surgery._labels import LabelStore

# Roles without which a unit is nobody's to remove.
_MAKING = ("producer", "index")


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
    slots = [slot for slot in store.slots.values() if len(slot.labels) > 1]
    if not slots:
        return (), {}
    sizes = [len(slot.labels) for slot in slots]
    root = roots[np.concatenate([slot.labels.numpy() for slot in slots])]
    slot_of = np.repeat(np.arange(len(slots)), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    produced = np.zeros(len(roots), dtype=bool)
    makes = np.array([slot.role in _MAKING for slot in slots])
    produced[root[makes[slot_of]]] = True
    used = (root > 0) & produced[root]
    root, slot_of, place = root[used], slot_of[used], place[used]
    if not len(root):
        return (), {}
    # A unit's make: which slots it touches, and how often. A random number a slot, added up, tells makes apart.
    numbers = np.random.default_rng(0).integers(1, 1 << 62, size=len(slots), dtype=np.uint64)
    make = np.zeros(len(roots), dtype=np.uint64)
    np.add.at(make, root, numbers[slot_of])
    order = np.lexsort((place, root, slot_of, make[root]))
    root, slot_of, place = root[order], slot_of[order], place[order]
    key = make[root]
    starts = np.flatnonzero(np.r_[True, (key[1:] != key[:-1]) | (slot_of[1:] != slot_of[:-1])])
    ends = np.r_[starts[1:], len(root)]
    found: dict[int, list[Member]] = {}
    units: dict[int, np.ndarray] = {}
    first_use: dict[int, int] = {}
    for start, end in zip(starts, ends, strict=True):
        number = int(key[start])
        members = units.get(number)
        if members is None:
            # Every slot of a make holds the same units.
            members = units[number] = np.unique(root[start:end])
        slot = slots[slot_of[start]]
        index = torch.from_numpy(place[start:end].copy()).view(len(members), -1)
        found.setdefault(number, []).append(Member(slot.parameter, slot.dim, index, slot.role, slot.module))
        if slot.role in _MAKING:
            first_use.setdefault(number, int(slot_of[start]))
    groups, unit_roots = [], {}
    taken: dict[str, int] = {}
    for number in sorted(found, key=lambda n: (first_use[n], int(units[n][0]))):
        if len(units[number]) < 2:
            continue
        name = _group_name(found[number], taken)
        groups.append(Group(name, len(units[number]), tuple(found[number]), Constraints()))
        unit_roots[name] = torch.from_numpy(units[number])
    return tuple(groups), unit_roots


def _group_name(members: list[Member], taken: dict[str, int]) -> str:
    first = min((member for member in members if member.role in _MAKING), key=lambda member: member.role == "index")
    owner, _, leaf = first.parameter.rpartition(".")
    # Several parameters of one module can produce (a bare parameter beside a weight): the module's name will do.
    name = owner if leaf in ("weight", "bias", "index") and owner else first.parameter
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}:{taken[name]}"
