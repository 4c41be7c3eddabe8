"""Running a network at other widths, and fitting the sizes of what it then multiplies."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.cost._count import Example, record, state_bytes
from convette.cost._recorder import Operation
from convette.errors import UsageError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Seconds of a run, or bytes of weights, above which the meta device is tried; below, its bookkeeping takes longer.
_WORTH_A_BLANK = 0.3
_TOO_MUCH_TO_COPY = 50e6


class Affine:
    """Values that are affine in the widths: ``offset + slope · w``."""

    def __init__(self, slope: "csr_matrix", offset: np.ndarray) -> None:
        self._slope, self._offset = slope, offset

    @staticmethod
    def through(slopes: Any, values: Any, widths: np.ndarray) -> "Affine":
        """The affine map with `slopes` that takes `values` at `widths`."""
        from scipy.sparse import csr_matrix

        slope = csr_matrix(np.asarray(slopes, dtype=float).reshape(len(values), len(widths)))
        return Affine(slope, np.asarray(values, dtype=float) - slope @ widths)

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        return self._offset[:, None] + self._slope @ widths


class Products:
    """Products whose sizes are fitted: each is the product of some affine sizes."""

    def __init__(self, affine: Affine, starts: Any) -> None:
        self._affine, self._starts = affine, list(starts)

    def totals(self, widths: np.ndarray) -> np.ndarray:
        """Sum of all products for widths ``(groups, n)``."""
        if not self._starts:
            return np.zeros(widths.shape[1])
        return np.multiply.reduceat(self._affine(widths), self._starts, axis=0).sum(axis=0)


class Blank:
    """Shrinks copies of the network and says what they then multiply; without values where that is faster.

    `base` is what the network multiplies as it is.
    """

    def __init__(self, model: nn.Module, example: Example, graph: Any) -> None:
        self.groups = [group.name for group in graph.groups]
        self.widths = [int(group.size) for group in graph.groups]
        self._graph = graph
        self._example = example
        self._model = model = _in_parts(model)
        start = time.perf_counter()
        self.base = record(model, example).operations
        if time.perf_counter() - start > _WORTH_A_BLANK or state_bytes(model)[0] > _TOO_MUCH_TO_COPY:
            self._try_without_values()

    def _try_without_values(self) -> None:
        tensors = (*self._model.parameters(), *self._model.buffers())
        blank = copy.deepcopy(self._model, {id(x): _without_values(x) for x in tensors})
        try:
            base = record(blank, self._example).operations
        except UsageError:
            return
        # Where the run depends on values it has to be run with them.
        if sum(op.macs for op in base) == sum(op.macs for op in self.base):
            self._model, self.base = blank, base

    def selection(self, shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Keep about a share of the units of each group named, as its constraints allow; all of the others."""
        kept = {}
        for group in self._graph.groups:
            parts, each = group.constraints.parts, group.size // group.constraints.parts
            keep = _allowed(group, round(each * shares.get(group.name, 1.0)))
            starts = torch.arange(parts)[:, None] * each
            kept[group.name] = (starts + torch.arange(keep)).reshape(-1)
        return kept

    def removed(self, shares: Mapping[str, float]) -> list[int]:
        """How many units of each group `selection` drops."""
        kept = self.selection(shares)
        return [size - len(kept[name]) for name, size in zip(self.groups, self.widths, strict=True)]

    def sizes(self, numbers: Sequence[int], shares: Mapping[str, float]) -> np.ndarray:
        """The sizes of the operations `numbers` with only those shares of the groups named, all in one row."""
        operations = self.operations(self.selection(shares))
        return np.array([size for number in numbers for size in operations[number].sizes], dtype=float)

    def operations(self, selection: Mapping[str, Tensor]) -> list[Operation]:
        """What the network, shrunk to `selection`, multiplies."""
        from convette.surgery import apply

        model = copy.deepcopy(self._model)
        apply(model, self._graph.shrink(selection), example=self._example)
        return record(model, self._example).operations


def _in_parts(model: nn.Module) -> nn.Module:
    """Return the network with attention layers that run alike at any number of heads; the same multiplications.

    PyTorch's own runs as one operator or as several, by its widths; cut to fewer heads it always runs as several.
    """
    from convette.surgery import Shrink, apply

    names = tuple(name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention)
    if not names:
        return model
    same = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    apply(same, Shrink({}, free_heads=names))
    return same


def _without_values(x: Tensor) -> Tensor:
    blank = x.detach().to("meta")
    return nn.Parameter(blank, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else blank


def _allowed(group: Any, wanted: int) -> int:
    """The number of units in each part nearest below `wanted` that the constraints of `group` allow, or above it."""
    rules, each = group.constraints, group.size // group.constraints.parts
    step = getattr(rules, "multiple_of", 1)
    allowed = [
        keep
        for keep in range(1, each)
        if keep * rules.parts >= getattr(rules, "minimum", 1) and keep * rules.parts % step == 0
    ]
    below = [keep for keep in allowed if keep <= wanted]
    return each if wanted >= each or not allowed else max(below) if below else allowed[0]


def fit(blank: Blank, sizes: Sequence[tuple[int, ...]], numbers: Sequence[int]) -> Products:
    """Fit the sizes of the operations `numbers` (which are `sizes` at full width) as affine in the widths.

    Mostly a size depends on one group. Groups are numbered from one, and the run number ``b`` shrinks those with bit
    ``b`` in their number: the runs in which a size changes spell its group. A size that spells none, changes unevenly,
    or is not what one more run says (two groups together may spell a third), depends on several groups, which are then
    tried one by one.
    """
    names, full = blank.groups, np.array([size for op in sizes for size in op], dtype=float)
    slopes = np.zeros((len(full), len(names)))
    if len(full) and names:
        removed = blank.removed(dict.fromkeys(names, 0.5))
        bits = range(len(names).bit_length())
        codes = [[name for column, name in enumerate(names) if (column + 1) >> bit & 1] for bit in bits]
        change = np.stack([full - blank.sizes(numbers, dict.fromkeys(code, 0.5)) for code in codes])
        odd = []
        for row, column_of_change in enumerate(change.T):
            changed = np.flatnonzero(column_of_change)
            column = sum(1 << int(bit) for bit in changed) - 1
            if column < 0:
                continue
            if column < len(names) and len(set(column_of_change[changed])) == 1 and removed[column]:
                slopes[row, column] = column_of_change[changed[0]] / removed[column]
            else:
                odd.append(row)
        uneven = {name: 0.3 + 0.1 * (column % 5) for column, name in enumerate(names)}
        wrong = np.abs(full - slopes @ np.array(blank.removed(uneven)) - blank.sizes(numbers, uneven)) > 1e-6
        odd = sorted({*odd, *np.flatnonzero(wrong).tolist()})
        slopes[odd] = 0
        for column in range(len(names)) if odd else ():
            if removed[column]:
                lost = full - blank.sizes(numbers, {names[column]: 0.5})
                slopes[odd, column] = lost[odd] / removed[column]
    starts = np.cumsum([0, *(len(op) for op in sizes)])[:-1]
    return Products(Affine.through(slopes, full, np.asarray(blank.widths, dtype=float)), starts)
