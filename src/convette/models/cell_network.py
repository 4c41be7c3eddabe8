"""Networks of cells: four nodes, each the sum of two outputs before it through an operation; or all of them, to search.

The cell is that of DARTS, arXiv 1806.09055; `convette.pruning.dass` searches it. Layers may be of any make.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.models._origin import attach_origin

NODES, NONE = 4, "none"
# (operation, input) twice a node, as numbers from 1: a cell of separable convolutions, for a network without a search.
PLAIN = (4, 1, 4, 2) * NODES
Make = Callable[..., nn.Module]


class _Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the shape a stride leaves."""
        return x[:, :, :: self.stride, :: self.stride] * 0


class _Halving(nn.Module):
    """Skips at stride 2: two 1x1 convolutions at places one pixel apart, side by side."""

    def __init__(self, channels: int, conv: Make) -> None:
        super().__init__()
        half = channels // 2
        self.one = conv(channels, half, 1, 2, bias=False)
        self.other = conv(channels, channels - half, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the halved maps."""
        y = F.pad(F.relu(x), (0, 1, 0, 1))[:, :, 1:, 1:] if min(x.shape[2:]) > 1 else F.relu(x)
        return self.norm(torch.cat([self.one(F.relu(x)), self.other(y)], dim=1))


def _separable(channels: int, kernel: int, stride: int, dilation: int, conv: Make, times: int) -> nn.Module:
    parts: list[nn.Module] = []
    for number in range(times):
        step = stride if number == 0 else 1
        padding = dilation * (kernel // 2)
        # Depthwise weights are nine a channel: they stay dense, or the mask would delete channels.
        parts += [
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel, step, padding, dilation, channels, bias=False),
            conv(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
    return nn.Sequential(*parts)


def _pool(kind: type, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(kind(3, stride, 1), nn.BatchNorm2d(channels))


OPERATIONS: dict[str, Callable[[int, int, Make], nn.Module]] = {
    NONE: lambda c, s, conv: _Zero(s),
    "skip": lambda c, s, conv: nn.Identity() if s == 1 else _Halving(c, conv),
    "max_pool_3x3": lambda c, s, conv: _pool(nn.MaxPool2d, c, s),
    "avg_pool_3x3": lambda c, s, conv: _pool(nn.AvgPool2d, c, s),
    "sep_conv_3x3": lambda c, s, conv: _separable(c, 3, s, 1, conv, 2),
    "sep_conv_5x5": lambda c, s, conv: _separable(c, 5, s, 1, conv, 2),
    "dil_conv_3x3": lambda c, s, conv: _separable(c, 3, s, 2, conv, 1),
    "dil_conv_5x5": lambda c, s, conv: _separable(c, 5, s, 2, conv, 1),
}


def candidate_operations() -> tuple[str, ...]:
    """Return the names of the operations an edge may be."""
    return tuple(OPERATIONS)


@dataclass(frozen=True)
class Genotype:
    """A found architecture: for the normal and the reduction cell eight (operation, input) pairs, two for each node."""

    normal: tuple[tuple[str, int], ...]
    reduction: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for cell in (self.normal, self.reduction):
            known = all(name != NONE and name in OPERATIONS for name, _ in cell)
            if len(cell) != 2 * NODES or not known or any(not 0 <= s < n // 2 + 2 for n, (_, s) in enumerate(cell)):
                raise UsageError(f"cells: a cell has {2 * NODES} edges with operations other than none.")

    def numbers(self) -> dict[str, list[int]]:
        """Return both cells as numbers from 1: operation and input of every edge in turn."""
        names = list(OPERATIONS)
        return {
            kind: [number for name, source in cell for number in (names.index(name), source + 1)]
            for kind, cell in (("normal", self.normal), ("reduction", self.reduction))
        }

    @staticmethod
    def from_numbers(normal: Sequence[int], reduction: Sequence[int]) -> "Genotype":
        """Read back what `numbers` wrote; `UsageError` for numbers that name nothing."""
        names, cells = list(OPERATIONS), []
        for numbers in (normal, reduction):
            if len(numbers) != 4 * NODES or any(n >= len(names) for n in numbers[::2]):
                raise UsageError(f"cells: {list(numbers)} are not {2 * NODES} pairs of an operation and an input.")
            cells.append(tuple((names[o], s - 1) for o, s in zip(numbers[::2], numbers[1::2], strict=True)))
        return Genotype(*cells)


class Cell(nn.Module):
    """A cell: all edges with all operations where `edges` is None, else the given ones."""

    def __init__(
        self, before: int, last: int, channels: int, reduction: bool, wide: bool, conv: Make, edges: Any = None
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.first = _entry(before, channels, conv, 2 if wide else 1)
        self.second = _entry(last, channels, conv, 1)
        self.edges, self.plan = nn.ModuleList(), edges
        for node in range(NODES):
            pairs = edges[2 * node : 2 * node + 2] if edges else [(None, source) for source in range(node + 2)]
            for name, source in pairs:
                stride = 2 if reduction and source < 2 else 1
                names = [name] if name else list(OPERATIONS)
                self.edges.append(nn.ModuleList([OPERATIONS[one](channels, stride, conv) for one in names]))

    def forward(self, before: Tensor, last: Tensor, weights: Tensor | None) -> Tensor:
        """Return the four nodes side by side; `weights` (edge, operation) mixes the operations."""
        states, at = [self.first(before), self.second(last)], 0
        for node in range(NODES):
            sources = [s for _, s in self.plan[2 * node : 2 * node + 2]] if self.plan else range(node + 2)
            total: Any = 0
            for source in sources:
                operations = self.edges[at]
                assert isinstance(operations, nn.ModuleList)
                if weights is None:
                    total = total + operations[0](states[source])
                else:
                    mix = zip(weights[at], operations, strict=True)
                    total = total + sum(w * operation(states[source]) for w, operation in mix)
                at += 1
            states.append(total)
        return torch.cat(states[2:], dim=1)


def _entry(ins: int, outs: int, conv: Make, stride: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), conv(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))


class CellNetwork(nn.Module):
    """A network of cells, reduction cells at one and two thirds of the depth; a supernet where `genotype` is None.

    `normal_alpha` and `reduction_alpha` (edge, operation) are the architecture of a supernet; ``softmax`` of a row
    mixes the operations of an edge. `conv` and `linear` make the layers between stem and logits; depthwise
    convolutions are plain ones. With plain layers the network knows its origin and can be saved.
    """

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        genotype: Genotype | None = None,
        conv: Make = nn.Conv2d,
        linear: Make = nn.Linear,
    ) -> None:
        super().__init__()
        width = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        before, last, now, wide = width, width, channels, False
        for number in range(cells):
            reduction = cells > 2 and number in (cells // 3, 2 * cells // 3)
            now = 2 * now if reduction else now
            edges = None if genotype is None else genotype.reduction if reduction else genotype.normal
            self.cells.append(Cell(before, last, now, reduction, wide, conv, edges))
            before, last, wide = last, NODES * now, reduction
        self.classifier = linear(last, num_classes)
        self.searching = genotype is None
        if genotype is None:
            shape = (sum(node + 2 for node in range(NODES)), len(OPERATIONS))
            self.normal_alpha = nn.Parameter(1e-3 * torch.randn(shape))
            self.reduction_alpha = nn.Parameter(1e-3 * torch.randn(shape))
        elif conv is nn.Conv2d and linear is nn.Linear:
            made: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
            made |= {"channels": channels, "cells": cells, **genotype.numbers()}
            attach_origin(self, "convette:cell_network", made)

    def architecture(self) -> list[nn.Parameter]:
        """Return the parameters that mix operations; none outside a search."""
        return [self.normal_alpha, self.reduction_alpha] if self.searching else []

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        before = last = self.stem(images)
        for cell in self.cells:
            weights = None
            if self.searching:
                weights = (self.reduction_alpha if cell.reduction else self.normal_alpha).softmax(1)
            before, last = last, cell(before, last, weights)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(last), 1).flatten(1))

    def genotype(self) -> Genotype:
        """Return the cells: for every node the two edges whose best operation (none aside) weighs most."""
        if not self.searching:
            raise UsageError("cells: this network was built of a genotype; only a supernet finds one.")
        return Genotype(_discrete(self.normal_alpha), _discrete(self.reduction_alpha))


def _discrete(alpha: Tensor) -> tuple[tuple[str, int], ...]:
    weights, names, first, found = alpha.detach().softmax(1), list(OPERATIONS), 0, []
    kept = [number for number, name in enumerate(names) if name != NONE]
    for node in range(NODES):
        rows = weights[first : first + node + 2][:, kept]
        best = rows.amax(1).argsort(descending=True, stable=True)[:2].sort().values.tolist()
        found += [(names[kept[int(rows[edge].argmax())]], edge) for edge in best]
        first += node + 2
    return tuple(found)


def cell_network(
    num_classes: int = 10,
    in_channels: int = 3,
    channels: int = 16,
    cells: int = 8,
    normal: tuple[int, ...] = PLAIN,
    reduction: tuple[int, ...] = PLAIN,
) -> CellNetwork:
    """Return a plain `CellNetwork` of the cells written as numbers (`Genotype.numbers`).

    Raises `UsageError` for numbers that name no operation or input.
    """
    genotype = Genotype.from_numbers(normal, reduction)
    return CellNetwork(channels, cells, in_channels=in_channels, num_classes=num_classes, genotype=genotype)
