"""Where two traces of a network differ: used to hold a trace without values to one with them."""

from typing import Any

import torch

from convette.surgery._graph import ChannelGraph


def difference(one: ChannelGraph, other: ChannelGraph) -> str:
    """Return the first thing in which two graphs differ, in a few words; empty where they are the same."""
    for what, left, right in zip(_PARTS, _noted(one), _noted(other), strict=True):
        if left != right:
            return f"{what}: {_first(left, right)}"
    for left, right in zip(one.groups, other.groups, strict=True):
        head = (left.name, left.size, left.constraints, len(left.members))
        if head != (right.name, right.size, right.constraints, len(right.members)):
            return f"group {head} is {(right.name, right.size, right.constraints, len(right.members))}"
        for a, b in zip(left.members, right.members, strict=True):
            same = (a.parameter, a.dim, a.role, a.module) == (b.parameter, b.dim, b.role, b.module)
            if not same or not torch.equal(a.index, b.index):
                return f"group {left.name!r}: {a.parameter} dim {a.dim} is {b.parameter} dim {b.dim}"
    return ""


_PARTS = ("calls", "frozen", "scopes", "sizes", "foldable steps", "readers", "unseen", "heads", "number of groups")


def _noted(graph: ChannelGraph) -> list[Any]:
    records = graph.records
    sizes = [
        (item.call, item.name, item.module, item.kind, item.axis, item.occurrence, len(item.outputs))
        for item in [*records.sizes, *records.scalars.values()]
    ]
    given = [(item.call, str(item.given)) for item in records.sizes if item.kind != "groups"]
    return [
        records.calls,
        [str(item) for item in graph.frozen],
        graph.scopes,
        [sizes, given],
        records.steps,
        records.uses,
        sorted(records.unseen),
        sorted(records.heads),
        len(graph.groups),
    ]


def _first(left: Any, right: Any) -> str:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        for a, b in zip(left, right, strict=False):
            if a != b:
                return f"{a} is {b}"[:300]
    return f"{left} is {right}"[:300]
