"""The channel graph: groups of units that can be removed, what each unit owns, and the edit that removes some."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import StructureError, did_you_mean
from convette.surgery._edits import Shrink
from convette.surgery._labels import LabelStore, Slot
from convette.surgery._records import FrozenOperator, Records

Selection: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Constraints:
    """What a selection of units must respect: at least `minimum` kept, a count divisible by `multiple_of`,
    and as many kept in each of `parts` equal stretches."""

    parts: int = 1
    minimum: int = 1
    multiple_of: int = 1


@dataclass(frozen=True)
class Member:
    """What the units of a group own in one dimension of one parameter or buffer.

    Unit u owns the entries ``index[u]`` along `dim` of `parameter`. `role`: "producer" (rows that compute the
    channel), "consumer" (columns that read it) or "affine" (one value a channel: norms, scales, statistics).
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


class ChannelGraph:
    """Which channels of a network go together, found by `trace`.

    `groups` holds what can be removed, `frozen` the functions that fixed channels because no rule says what they do,
    `scopes` the calls whose statistics run over removable channels (layer norm, a mean over channels): there a
    removal changes the other channels' values by nature.
    """

    def __init__(self, model: nn.Module, example: Any, store: LabelStore, records: Records, roots: np.ndarray) -> None:
        """Use `trace`."""
        self.model, self.example = model, example
        self._store, self._records = store, records
        self.roots = torch.from_numpy(roots)
        self.frozen: tuple[FrozenOperator, ...] = tuple(dict.fromkeys(records.frozen))
        self.groups, self._unit_roots = build_groups(store, roots)
        self._by_name = {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        """Return the group called `name`; raises `StructureError` where there is none."""
        group = self._by_name.get(name)
        if group is None:
            raise StructureError(f"no group of channels is called {name!r}.{did_you_mean(name, self._by_name)}")
        return group

    def __iter__(self) -> Iterator[Group]:
        """Go through the groups."""
        return iter(self.groups)

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.groups)

    @property
    def units(self) -> int:
        """How many units all groups hold."""
        return sum(group.size for group in self.groups)

    @property
    def scopes(self) -> tuple[tuple[str, str], ...]:
        """The calls with statistics over removable channels: (function, module)."""
        result = []
        for scope in self._records.scopes:
            if any(bool((self._removable[layer.reshape(-1)[:1]]).any()) for layer in scope.layers):
                result.append((scope.name, scope.module))
        return tuple(dict.fromkeys(result))

    @property
    def _removable(self) -> Tensor:
        mask = torch.zeros(len(self.roots), dtype=torch.bool)
        for roots in self._unit_roots.values():
            mask[roots] = True
        return mask[self.roots]

    def check(self, selection: Selection) -> None:
        """Raise `StructureError` where `selection` names an unknown group, is empty or out of range, or breaks a
        constraint."""
        for name, kept in selection.items():
            _check_kept(self[name], kept)

    def keeping(self, selection: Selection) -> Tensor:
        """Return for every label whether its channel stays (Bool, indexed by root)."""
        self.check(selection)
        keep = torch.ones(len(self.roots), dtype=torch.bool)
        for name, kept in selection.items():
            roots = self._unit_roots[name]
            keep[roots] = False
            keep[roots[kept]] = True
        return keep

    def shrink(self, selection: Selection) -> Shrink:
        """Return the edit that keeps the selected units of each named group and everything else.

        Where sizes are written in Python the shrunk network is run once or twice on the example to find which
        attribute holds them; the model is as before when this returns. Raises `StructureError` for a selection that
        does not fit and for a size that cannot be changed, with its source line.
        """
        from convette.surgery._shrinking import shrink_edit

        return shrink_edit(self, self.keeping(selection))

    def explain(self, module_name: str, index: int) -> str:
        """Say in words what goes with output channel `index` of a module, and which calls tie it."""
        from convette.surgery._explaining import explain_channel

        return explain_channel(self, module_name, index)

    def slots(self) -> list[Slot]:
        """Return every labelled dimension of every parameter, in order of use."""
        return list(self._store.slots.values())

    @property
    def records(self) -> Records:
        """What the trace noted."""
        return self._records

    @property
    def store(self) -> LabelStore:
        """The labels themselves."""
        return self._store

    def __repr__(self) -> str:
        """Name the sizes."""
        return f"ChannelGraph({len(self.groups)} groups, {self.units} units, {len(self.frozen)} frozen operators)"


def _check_kept(group: Group, kept: Tensor) -> None:
    name = group.name
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1:
        raise StructureError(f"group {name!r}: the kept units must be a one-dimensional int64 tensor.")
    if len(kept) == 0:
        raise StructureError(f"group {name!r}: at least one of its {group.size} units must stay.")
    if int(kept.min()) < 0 or int(kept.max()) >= group.size:
        raise StructureError(f"group {name!r} has units 0 to {group.size - 1}; asked for {int(kept.max())}.")
    if len(kept) > 1 and not bool((kept.diff() > 0).all()):
        raise StructureError(f"group {name!r}: the kept units must be sorted and each named once.")
    rules = group.constraints
    if len(kept) < min(rules.minimum, group.size):
        raise StructureError(f"group {name!r}: at least {rules.minimum} units must stay, {len(kept)} were selected.")
    if rules.multiple_of > 1 and len(kept) % rules.multiple_of and len(kept) != group.size:
        raise StructureError(f"group {name!r}: the number of units kept must be a multiple of {rules.multiple_of}.")
    if rules.parts > 1:
        counts = torch.bincount(kept * rules.parts // group.size, minlength=rules.parts)
        if len(counts.unique()) > 1:
            raise StructureError(f"group {name!r}: as many units must stay in each of its {rules.parts} parts.")


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
    makes = np.array([slot.role == "producer" for slot in slots])
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
        if slot.role == "producer":
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
    first = next(member for member in members if member.role == "producer")
    owner, _, leaf = first.parameter.rpartition(".")
    # Several parameters of one module can produce (a bare parameter beside a weight): the module's name will do.
    name = owner if leaf in ("weight", "bias") and owner else first.parameter
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}:{taken[name]}"
