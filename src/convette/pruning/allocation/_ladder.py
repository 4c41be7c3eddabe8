"""The widths that a group may take, and the order in which its units go."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convette.pruning._units import Scores
from convette.surgery import ChannelGraph, Group


@dataclass(frozen=True)
class WidthRules:
    """What a selection has to keep to beside the constraints of the graph (`ChannelGraph.constrain`), which a run uses.

    `minimum`: how many units of a group must stay (by group name; at least one does anyway). `multiple_of`: channels
    that stay are a multiple of this, or all of them; engines with wide vector units often run 8, 16 or 32 faster.
    """

    multiple_of: int = 1
    minimum: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ladder:
    """The rungs of one group: `widths` ascending up to its size; ``order[:width]`` are the units kept at a width.

    Block i is what goes when the group steps down from ``widths[i + 1]`` to ``widths[i]``; ``block_scores[i]`` is the
    mean score of its units and does not increase with i.
    """

    name: str
    order: Tensor
    widths: tuple[int, ...]
    block_scores: tuple[float, ...]

    @property
    def size(self) -> int:
        """The units the group has now."""
        return self.widths[-1]

    def kept(self, rung: int) -> Tensor:
        """Return the sorted units that stay on `rung`."""
        return self.order[: self.widths[rung]].sort().values

    def rung_of(self, selection: Mapping[str, Tensor]) -> int:
        """Return the rung that a selection puts the group on."""
        kept = selection.get(self.name)
        return len(self.widths) - 1 if kept is None else self.widths.index(len(kept))

    def removed_fraction(self, rung: int) -> float:
        """Return the share of the group's units that is gone on `rung`."""
        return 1 - self.widths[rung] / self.size


def build_ladders(scores: Scores, graph: ChannelGraph, rules: WidthRules | None = None) -> list[Ladder]:
    """Return a ladder for every group of `graph` that has scores; the others stay whole."""
    if rules is not None and rules.multiple_of > 1:
        graph = graph.constrain(multiple_of=rules.multiple_of, allow_nothing=True)
    least = rules.minimum if rules is not None else {}
    return [
        _ladder(group, scores[group.name], least.get(group.name, 1))
        for group in graph.groups
        if group.name in scores and group.size
    ]


def _ladder(group: Group, score: Tensor, least: int = 1) -> Ladder:
    parts = group.constraints.parts
    # Equal numbers stay in every part: take the best of each part, then the second best of each ...
    by_part = score.view(parts, -1).sort(dim=1, descending=True, stable=True)
    offsets = torch.arange(parts).unsqueeze(1) * (group.size // parts)
    order = (by_part.indices + offsets).t().flatten()
    ranked = score[order]
    step = math.lcm(parts, group.constraints.multiple_of)
    least = min(max(least, group.constraints.minimum, 1), group.size)
    first = math.ceil(least / step) * step
    widths = (*range(first, group.size, step), group.size)
    blocks = tuple(float(ranked[low:high].mean()) for low, high in itertools.pairwise(widths))
    return Ladder(group.name, order, widths, blocks)
