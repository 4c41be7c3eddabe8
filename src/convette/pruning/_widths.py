"""What every cut of a run keeps to, whatever chooses it: one `WidthConstraints`, from the three ways to ask for it."""

import math
from dataclasses import replace

from convette.surgery import ChannelGraph, WidthConstraints


def width_constraints(constraints: str, multiple_of: int, min_fraction: float | int) -> WidthConstraints:
    """Return what the line `constraints` and the settings `multiple_of` and `min_fraction` ask for together."""
    asked = WidthConstraints.parse(constraints)
    share = max(float(asked.min_fraction), float(min_fraction))
    return replace(asked, multiple_of=math.lcm(asked.multiple_of, multiple_of), min_fraction=share)


def sizes_of(graph: ChannelGraph) -> dict[str, int]:
    """Return the units of every group by name: what shares are shares of, in all cuts to come."""
    return {group.name: group.size for group in graph.groups}
