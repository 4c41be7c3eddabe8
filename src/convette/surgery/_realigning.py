"""Where new channels end up once a network moves them about: read off a trace of the grown network."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from convette.errors import StructureError
from convette.surgery._graph import ChannelGraph
from convette.surgery._groups import Group
from convette.surgery._grow import Grow, Widening

Tag = tuple[str, int, bool]  # group, unit, is it a new copy of it


def realigned(graph: ChannelGraph, edit: Grow, sources: Mapping[str, Sequence[Sequence[int]]]) -> Grow | None:
    """Return `edit` with its new entries at the places where the new channels really arrive; None if it has them there.

    New units are put behind the last one. A network that turns channels round (flip) or rotates them reads them
    elsewhere. Sizes do not depend on places, so the grown network is traced, and what goes with the new rows of each
    group's first producer shows where they are. Cost: a trace.
    """
    from convette.surgery._trace import trace

    try:
        change = edit.apply(graph.model)
        try:
            wide = trace(graph.model, graph.example)
            slots = {(slot.parameter, slot.dim): wide.roots[slot.labels].tolist() for slot in wide.slots()}
        finally:
            change.revert()
    except StructureError:
        return None
    tags: dict[int, Tag] = {}
    for name in sources:
        if not _tag(graph[name], edit, slots, tags):
            return None
    units = _units(graph, sources)
    widened: dict[tuple[str, int], Widening] = {}
    for key, item in edit.widened.items():
        made = _widening(item, slots.get(key, []), tags, units.get(key, {}))
        if made is None:
            return None
        widened[key] = made
    return None if widened == dict(edit.widened) else dataclasses.replace(edit, widened=widened)


def _tag(group: Group, edit: Grow, slots: Mapping[tuple[str, int], list[int]], tags: dict[int, Tag]) -> bool:
    """Note which label of the grown network is which unit; tell whether that is without contradiction."""
    anchor = next((m for m in group.of("producer") if (m.parameter, m.dim) in edit.widened), None)
    if anchor is None:
        return False
    key = (anchor.parameter, anchor.dim)
    item, roots = edit.widened[key], slots.get(key, [])
    unit_of = {int(place): unit for unit, own in enumerate(anchor.index.tolist()) for place in own}
    behind, new = item.index(len(roots) - len(item.new)).tolist(), set(item.new)
    for place, root in enumerate(roots):
        unit = unit_of.get(behind[place])
        if unit is None:
            continue
        tag = (group.name, unit, place in new)
        if root == 0 or tags.setdefault(root, tag) != tag:
            return False
    return True


def _units(graph: ChannelGraph, names: Mapping[str, object]) -> dict[tuple[str, int], dict[tuple[str, int], Tensor]]:
    """Return for each slot the entries of each unit of the groups that grow."""
    result: dict[tuple[str, int], dict[tuple[str, int], Tensor]] = {}
    for name in names:
        for member in graph[name].members:
            table = result.setdefault((member.parameter, member.dim), {})
            for unit, own in enumerate(member.index):
                table[name, unit] = own
    return result


def _widening(
    item: Widening, roots: Sequence[int], tags: Mapping[int, Tag], units: Mapping[tuple[str, int], Tensor]
) -> Widening | None:
    """Return the widening of one slot by the labels of the grown network; None where old entries are not in order."""
    old = len(roots) - len(item.new)
    owner = {int(place): unit for unit, own in units.items() for place in own.tolist()}
    new: list[int] = []
    source: list[int] = []
    seen: dict[int, int] = {}
    kept = 0
    for place, root in enumerate(roots):
        tag = tags.get(root)
        if tag is not None and tag[2]:
            own = units.get(tag[:2])
            number = seen.get(root, 0)
            seen[root] = number + 1
            if own is None or number >= len(own):
                return None
            new.append(place)
            source.append(int(own[number]))
            continue
        if tag is not None and owner.get(kept) != tag[:2]:
            return None
        kept += 1
    if kept != old or not new:
        return None
    return Widening(item.role, tuple(new), tuple(source))
