"""Predicting what a network costs at other widths, exactly and without editing it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.cost._count import Example
from convette.cost._probes import Affine, Blank, fit
from convette.cost._recorder import Operation
from convette.errors import ConvetteError, UsageError, did_you_mean

_METRICS = ("macs", "parameters", "size")


class WidthCost:
    """MACs, parameters and size of a network for any selection of its units.

    A dimension of a parameter shrinks by the entries of the units that are dropped, so it is affine in the numbers of
    kept units ``w``: ``d = offset + slope · w``. A tensor has the product of its dimensions as elements; a convolution
    or linear map costs its places (or rows) times the elements of its weight. What depends on widths in another way
    (attention products, a convolution over channels, token mixing) is found by running a really shrunk copy, and its
    sizes are fitted from a few more; all is then held against one more shrunk copy (`exact`).

    Args:
        model: the network; left as it is.
        example: as for `count`; the predictions are for all of it.
        graph: the groups of removable units (`convette.surgery.trace`).

    Attributes:
        groups: names of the groups, in the order of a vector of widths.
        sizes: number of units of each group.
        exact: whether a really shrunk network had the MACs that were predicted (None: it could not be tried).

    Cost: three runs, some more where something is fitted (on the meta device where a run takes long); a prediction
    about 0.05 ms, thousands at once (`predict`) a few microseconds each.
    """

    def __init__(self, model: nn.Module, example: Example, graph: Any) -> None:
        self.groups: tuple[str, ...] = tuple(group.name for group in graph.groups)
        self.sizes: tuple[int, ...] = tuple(int(group.size) for group in graph.groups)
        self.exact: bool | None = None
        self._column = {name: column for column, name in enumerate(self.groups)}
        state = _State(model)
        self._layout = _Layout(state, graph, self._column)
        self._bytes = state.bytes
        self._is_parameter = state.is_parameter
        self._fit_products(model, example, graph, state)

    def macs(self, selection: Mapping[str, Tensor]) -> int:
        """Multiply-accumulates with only the units of `selection` kept (see `count`)."""
        return self._one("macs", selection)

    def parameters(self, selection: Mapping[str, Tensor]) -> int:
        """Number of parameters with only the units of `selection` kept."""
        return self._one("parameters", selection)

    def size(self, selection: Mapping[str, Tensor]) -> int:
        """Bytes of parameters and persistent buffers with only the units of `selection` kept (see `Cost.size`)."""
        return self._one("size", selection)

    def widths(self, selection: Mapping[str, Tensor]) -> Tensor:
        """Number of kept units of each group (int64), in the order of `groups`; groups left out keep all.

        Raises:
            UsageError: a group the network does not have.
        """
        return torch.tensor(self._kept(selection), dtype=torch.int64)

    def _kept(self, selection: Mapping[str, Tensor]) -> list[int]:
        widths = list(self.sizes)
        for name, kept in selection.items():
            column = self._column.get(name)
            if column is None:
                raise UsageError(f"The network has no group of units {name!r}.{did_you_mean(name, self.groups)}")
            widths[column] = len(kept)
        return widths

    def predict(self, metric: str, widths: Tensor) -> Tensor:
        """One figure for many widths at once.

        Args:
            metric: "macs", "parameters" or "size".
            widths: numbers of kept units ``(..., groups)``.

        Returns:
            int64, of the leading shape of `widths`.

        Raises:
            UsageError: another metric, or a wrong number of groups.
        """
        if metric not in _METRICS:
            raise UsageError(f"{metric!r} cannot be predicted from widths.{did_you_mean(metric, _METRICS)}")
        if widths.shape[-1] != len(self.groups):
            raise UsageError(f"{widths.shape[-1]} widths were given for {len(self.groups)} groups.")
        leading = widths.shape[:-1]
        flat = widths.reshape(leading.numel(), len(self.groups)).cpu().numpy().astype(float).T
        return torch.from_numpy(np.rint(self._totals(metric, flat)).astype(np.int64)).reshape(leading)

    def unit_costs(self, metric: str, selection: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What dropping one more unit of each group saves, all other groups kept as in `selection` (None: all).

        Units of one group own alike numbers of entries, so they save alike: the vector of a group (float32, one entry
        a unit, kept or not) holds one value. Where a unit can only go together with others (equal parts, whole
        heads) it is the saving of that one unit's share.
        """
        widths = self.widths(selection or {})
        steps = torch.eye(len(self.groups), dtype=torch.int64)
        full = self.predict(metric, widths)
        savings = full - self.predict(metric, widths[None] - steps * (widths > 0))
        return {
            name: torch.full((size,), float(saving))
            for name, size, saving in zip(self.groups, self.sizes, savings.tolist(), strict=True)
        }

    def _one(self, metric: str, selection: Mapping[str, Tensor]) -> int:
        widths = np.array(self._kept(selection), dtype=float)
        return round(float(self._totals(metric, widths[:, None])[0]))

    def _totals(self, metric: str, widths: np.ndarray) -> np.ndarray:
        """One figure for widths ``(groups, n)``, before rounding."""
        elements = self._layout.elements(widths)
        if metric == "macs":
            return self._coefficients @ elements + self._fitted.totals(widths)
        return (self._is_parameter if metric == "parameters" else self._bytes) @ elements

    # --- products --------------------------------------------------------------------------------------------

    def _fit_products(self, model: nn.Module, example: Example, graph: Any, state: "_State") -> None:
        """Turn the operations of the run into coefficients of weights, and fit those that do not follow a weight."""
        blank = Blank(model, example, graph)
        base = blank.base
        if not self.groups:
            self._coefficients = self._follow_weights(base, state, [])
            self._fitted = fit(blank, [op.sizes for op in base if op.weight is None], [])
            self.exact = True
            return
        first = blank.selection(dict.fromkeys(self.groups, 0.5))
        seen = blank.operations(first)
        irregular = self._irregular(base, seen, state, self.widths(first))
        self._coefficients = self._follow_weights(base, state, irregular)
        self._fitted = fit(blank, [base[number].sizes for number in irregular], irregular)
        second = blank.selection({name: 0.3 + 0.5 * (i % 5) / 4 for i, name in enumerate(self.groups)})
        self.exact = sum(op.macs for op in blank.operations(second)) == self.macs(second)

    @staticmethod
    def _follow_weights(operations: Sequence[Operation], state: "_State", irregular: Sequence[int]) -> np.ndarray:
        """MACs for each element of each tensor, from the operations that follow a weight."""
        coefficients, left_out = np.zeros(len(state.names)), set(irregular)
        for number, op in enumerate(operations):
            if op.weight is not None and number not in left_out:
                row = state.row[op.weight]
                coefficients[row] += op.macs / max(state.elements[row], 1)
        return coefficients

    def _irregular(
        self, base: Sequence[Operation], seen: Sequence[Operation], state: "_State", widths: Tensor
    ) -> list[int]:
        """Numbers of the operations whose MACs do not follow the elements of a weight."""
        elements = self._layout.elements(widths.numpy().astype(float)[:, None])[:, 0]
        odd = []
        if len(base) != len(seen):
            raise ConvetteError(
                "The shrunk network runs other operators than the network: its cost cannot be predicted."
            )
        for number, (before, after) in enumerate(zip(base, seen, strict=True)):
            if before.weight is None:
                predicted = 0.0
            else:
                row = state.row[before.weight]
                predicted = before.macs / max(state.elements[row], 1) * elements[row]
            if (before.weight is None and before.macs) or round(predicted) != after.macs:
                odd.append(number)
        return odd


class _State:
    """The tensors a file of the network holds, each once: names, shapes, bytes."""

    def __init__(self, model: nn.Module) -> None:
        parameters = {id(p) for p in model.parameters()}
        self.unsaved = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.row: dict[str, int] = {}
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        bytes_each, is_parameter, rows = [], [], {}
        for name, x in model.state_dict(keep_vars=True).items():
            if not isinstance(x, Tensor):
                continue
            if id(x) not in rows:
                rows[id(x)] = len(self.names)
                self.names.append(name)
                self.shapes.append(tuple(x.shape))
                bytes_each.append(x.element_size())
                is_parameter.append(id(x) in parameters)
            self.row[name] = rows[id(x)]
        self.elements = np.array([math.prod(shape) for shape in self.shapes], dtype=float)
        self.bytes = np.array(bytes_each, dtype=float)
        self.is_parameter = np.array(is_parameter, dtype=float)


class _Layout:
    """Elements of every tensor as a function of the widths: fixed part times affine dimensions."""

    def __init__(self, state: _State, graph: Any, column: Mapping[str, int]) -> None:
        slopes: dict[tuple[int, int], dict[int, int]] = {}
        for group in graph.groups:
            for member in group.members:
                row = state.row.get(member.parameter)
                if row is None and member.parameter in state.unsaved:
                    continue
                each = member.index.shape[1] if member.index.dim() > 1 else 1
                if row is None or each * group.size > state.shapes[row][member.dim]:
                    raise ConvetteError(
                        f"The graph of units is not of this network: {group.name} has {each * group.size} entries of "
                        f"{member.parameter} (dimension {member.dim}). Trace the network again."
                    )
                entry = slopes.setdefault((row, member.dim), {})
                entry[column[group.name]] = entry.get(column[group.name], 0) + each
        keys = sorted(slopes)
        sizes = np.zeros(len(column))
        for group in graph.groups:
            sizes[column[group.name]] = group.size
        rows = [[slopes[key].get(c, 0) for c in range(len(column))] for key in keys]
        self._affine = Affine.through(rows, [state.shapes[row][dim] for row, dim in keys], sizes)
        # For every tensor the numbers of its varying dimensions, padded with the last one, which is always 1.
        of_tensor: list[list[int]] = [[] for _ in state.names]
        for number, (row, _) in enumerate(keys):
            of_tensor[row].append(number)
        width = max((len(numbers) for numbers in of_tensor), default=0)
        self._factors = np.array(
            [numbers + [len(keys)] * (width - len(numbers)) for numbers in of_tensor], dtype=np.int64
        ).reshape(len(state.names), width)
        varying = [{dim for r, dim in keys if r == row} for row in range(len(state.names))]
        self._fixed = np.array(
            [
                math.prod(size for dim, size in enumerate(shape) if dim not in varying[row])
                for row, shape in enumerate(state.shapes)
            ],
            dtype=float,
        )

    def elements(self, widths: np.ndarray) -> np.ndarray:
        """Elements of each tensor ``(tensors, n)`` for widths ``(groups, n)``."""
        dimensions = self._affine(widths)
        padded = np.concatenate([dimensions, np.ones((1, dimensions.shape[1]))])
        return self._fixed[:, None] * padded[self._factors].prod(axis=1)
