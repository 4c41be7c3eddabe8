"""The channel graph: groups of units that can be removed, what each unit owns, and the edit that removes some."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import StructureError, did_you_mean
from convette.surgery._constraints import WidthConstraints, constrained, least_units
from convette.surgery._edits import Shrink
from convette.surgery._groups import Group, build_groups
from convette.surgery._labels import LabelStore, Slot, narrowed, normalised
from convette.surgery._records import FrozenOperator, Records

Selection: TypeAlias = Mapping[str, Tensor]


class ChannelGraph:
    """Which channels of a network go together, found by `trace`.

    `groups` holds what can be removed, `frozen` the functions that fixed channels because no rule says what they do,
    `scopes` the calls whose statistics run over removable channels (layer norm, a mean over channels): there a
    removal changes the other channels' values by nature; `kept` the groups that constraints keep whole, and which.
    """

    def __init__(self, model: nn.Module, example: Any, store: LabelStore, records: Records, roots: np.ndarray) -> None:
        """Use `trace`."""
        self.model, self.example = model, example
        self._store, self._records = store, records
        self.roots = torch.from_numpy(roots)
        self.frozen: tuple[FrozenOperator, ...] = tuple(dict.fromkeys(records.frozen))
        groups, self._unit_roots = build_groups(store, roots)
        # A variance taken in training mode, as layers do that standardise their weights, needs two values.
        singles = [
            self.roots[narrowed(normalised(layer))]
            for scope in records.scopes
            if scope.name == "batch_norm"
            for layer in scope.layers
        ]
        self.groups = least_units(groups, self._unit_roots, singles, len(roots))
        self.kept: dict[str, str] = {}
        self._by_name = {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        """Return the group called `name`; raises `StructureError` where there is none."""
        group = self._by_name.get(name)
        if name in self.kept:
            raise StructureError(f"group {name!r} stays as it is by the constraint {self.kept[name]!r}.")
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

    def constrain(
        self,
        constraints: WidthConstraints | str | None = None,
        *,
        multiple_of: int = 1,
        minimum: int | float = 1,
        whole_heads: bool = False,
        keep: tuple[str, ...] | str = (),
        min_fraction: float | int = 0.0,
        allow_nothing: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> "ChannelGraph":
        """Return this graph with constraints on every selection: ``graph.constrain("multiple_of=8, keep stem*")``.

        Given as `WidthConstraints`, as the text of one, or by its fields. Groups that must stay whole are no longer in
        `groups` but in `kept`. Shares are of `sizes` by group name, the units there were before earlier cuts, where
        given. Raises `StructureError` where a pattern fits no module or, unless `allow_nothing`,
        nothing could be removed.
        """
        if isinstance(constraints, str):
            constraints = WidthConstraints.parse(constraints)
        patterns = (keep,) if isinstance(keep, str) else tuple(keep)
        wanted = constraints or WidthConstraints(multiple_of, minimum, whole_heads, patterns, min_fraction)
        return constrained(self, wanted, allow_nothing, sizes or {})

    def check(self, selection: Selection) -> None:
        """Raise `StructureError` where `selection` names an unknown group, is empty or out of range, or breaks a
        constraint."""
        if not _certainly_right(self, selection):
            for name, kept in selection.items():
                _check_kept(self[name], kept)

    def keeping(self, selection: Selection) -> Tensor:
        """Return for every label whether its channel stays (Bool, indexed by root)."""
        self.check(selection)
        keep = torch.ones(len(self.roots), dtype=torch.bool)
        if selection:
            roots = [self._unit_roots[name] for name in selection]
            keep[torch.cat(roots)] = False
            chosen = [own.index_select(0, kept) for own, kept in zip(roots, selection.values(), strict=True)]
            keep[torch.cat(chosen)] = True
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


def _certainly_right(graph: ChannelGraph, selection: Selection) -> bool:
    """Tell whether `selection` is right beyond doubt: all groups at once, which takes a fraction of the time."""
    ends, sizes, end = [], [], 0
    for name, kept in selection.items():
        group = graph._by_name.get(name)
        if group is None or not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1:
            return False
        rules, count = group.constraints, kept.shape[0]
        if not max(1, min(rules.minimum, group.size)) <= count or rules.parts > 1 or not kept.is_cpu:
            return False
        if rules.multiple_of > 1 and count % rules.multiple_of and count != group.size:
            return False
        end += count
        ends.append(end)
        sizes.append(group.size)
    if not end:
        return True
    units = torch.cat(list(selection.values())).numpy()
    rising = units[1:] > units[:-1]
    rising[np.array(ends[:-1], dtype=np.int64) - 1] = True
    # In rising lists the first is the smallest and the last the largest.
    starts = units[np.array([0, *ends[:-1]])]
    return bool(rising.all() and (starts >= 0).all() and (units[np.array(ends) - 1] < np.array(sizes)).all())


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
