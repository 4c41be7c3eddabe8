"""Labels: whole numbers that say which channels are the same channel.

Every value of a network carries *layers*: integer tensors of the value's own shape. Equal numbers mark elements that
can only be removed together; 0 marks what can never be removed. An element of a value with several layers (a weight
has one for each of its dimensions) disappears as soon as one of its labels does. A layer is expanded (stride 0)
along every axis it does not depend on, so that its cost is that of the axes it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

_AXES = "_convette_axes"
_VECTOR = "_convette_vector"


def varying(layer: Tensor) -> tuple[int, ...]:
    """Return the axes along which `layer` is stored, that is, may vary."""
    known = vars(layer)
    axes = known.get(_AXES)
    if axes is None:
        axes = known[_AXES] = tuple(
            axis for axis, (size, step) in enumerate(zip(layer.shape, layer.stride(), strict=True)) if size > 1 and step
        )
    return axes


def inhabited(layer: Tensor) -> Tensor:
    """Return `layer` with length 1 along axes of length 0 (a batch without examples), its labels kept."""
    if 0 not in layer.shape or layer.untyped_storage().nbytes() == 0:
        return layer
    steps = [step if size else 0 for size, step in zip(layer.shape, layer.stride(), strict=True)]
    return layer.as_strided([size or 1 for size in layer.shape], steps)


def normalised(layer: Tensor) -> Tensor:
    """Return `layer` with stride 0 along every axis on which its values are constant."""
    shape = layer.shape
    layer = inhabited(layer)
    # Last axes first: in images these are rows and columns, which nearly always collapse.
    for axis in reversed(varying(layer)):
        first = layer.narrow(axis, 0, 1)
        if bool((layer == first).all()):
            layer = first
    return layer.expand(shape)


def spread(vector: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Return the layer of `shape` that equals `vector` along `axis` and is constant elsewhere."""
    size = shape[axis]
    if vector.shape[0] != size or 0 in shape:
        view = [1] * len(shape)
        view[axis] = -1
        return vector.view(view).expand(*shape)
    steps = [0] * len(shape)
    steps[axis] = step = vector.stride(0)
    layer = vector.as_strided(shape, steps)
    known = vars(layer)
    if size > 1 and step:
        known[_AXES] = (axis,)
        known[_VECTOR] = vector
    else:
        known[_AXES] = ()
    return layer


def vector_of(layer: Tensor) -> Tensor:
    """Return the labels of a layer that varies along one axis."""
    known = vars(layer)
    vector = known.get(_VECTOR)
    if vector is None:
        (axis,) = varying(layer)
        index = tuple(slice(None) if other == axis else 0 for other in range(layer.ndim))
        vector = known[_VECTOR] = inhabited(layer)[index]
    return vector


def broadcast(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `layer` over a larger shape, as ``expand`` does."""
    if layer.shape == shape:
        return layer
    axes = varying(layer)
    if len(axes) == 1 and 0 not in layer.shape:
        return spread(vector_of(layer), axes[0] + len(shape) - layer.ndim, shape)
    return layer.expand(*shape)


def narrowed(layer: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """Return `layer` cut to length 1 along the axes on which it is constant, except those in `keep`."""
    for axis, (size, step) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
        if size > 1 and step == 0 and axis not in keep:
            layer = layer.narrow(axis, 0, 1)
    return layer


def moved(layer: Tensor, shape: Sequence[int], axes: Sequence[int], move: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `move`, which works along `axes` only and keeps the number of axes, to the stored part of `layer`."""
    return normalised(move(narrowed(layer, keep=axes))).expand(*shape)


def reshaped(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `layer` in a new shape of as many elements, read row by row, without spreading what is constant."""
    if 0 in shape and 0 in layer.shape:
        return reshaped(inhabited(layer), [size or 1 for size in shape]).expand(*shape)
    head = 0
    while head < min(layer.ndim, len(shape)) and layer.shape[head] == shape[head]:
        head += 1
    tail = 0
    while tail < min(layer.ndim, len(shape)) - head and layer.shape[-1 - tail] == shape[len(shape) - 1 - tail]:
        tail += 1
    small = layer
    target = list(shape)
    for axis in [*range(head), *range(layer.ndim - tail, layer.ndim)]:
        if layer.stride(axis) == 0 and layer.shape[axis] > 1:
            small = small.narrow(axis, 0, 1)
            target[axis if axis < head else axis - layer.ndim + len(shape)] = 1
    out = small.reshape(target)
    if out.data_ptr() != small.data_ptr() or out.numel() == 0:
        out = normalised(out)
    return out.expand(*shape)


_NOBODY = torch.zeros(1, dtype=torch.int64, device="cpu")


@dataclass(slots=True)
class Slot:
    """One dimension of one parameter or buffer, and the label of each index along it."""

    parameter: str
    dim: int
    labels: Tensor
    role: str
    module: str


class LabelStore:
    """Hands out labels, collects which of them are the same, and solves it all in one go."""

    def __init__(self) -> None:
        """Start with label 0, the fixed one."""
        self.count = 1
        self.slots: dict[tuple[str, int], Slot] = {}
        self.order: dict[str, int] = {}
        self.starts: list[int] = []  # the first label of each slot that owns fresh labels, and the slot
        self.owners: list[Slot] = []
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._why: list[int] = []

    def reserve(self, parameter: str, shape: torch.Size) -> bool:
        """Give a parameter its place in the order before it is labelled; tell whether it has anything to label."""
        self.order.setdefault(parameter, len(self.order))
        return any(size > 1 for size in shape)

    def sort(self) -> None:
        """Put the slots in the order in which their parameters were first read."""
        last = len(self.order)
        self.slots = dict(sorted(self.slots.items(), key=lambda item: (self.order.get(item[0][0], last), item[0][1])))

    def fresh(self, size: int) -> Tensor:
        """Return `size` labels that nobody has yet."""
        self.count += size
        return torch.arange(self.count - size, self.count, device="cpu")

    def unite(self, left: Tensor, right: Tensor, why: int) -> None:
        """State that two layers that broadcast together are the same, element by element; `why` is a call."""
        if left is right:
            return
        if left.ndim == 1 and left.shape == right.shape and left.stride(0) and right.stride(0):
            self._left.append(left)
            self._right.append(right)
            self._why.append(why)
            return
        if left.shape == right.shape and len(varying(left)) == 1 and varying(left) == varying(right):
            self.unite(vector_of(left), vector_of(right), why)
            return
        left, right = inhabited(left), inhabited(right)
        ndim = max(left.ndim, right.ndim)
        for axis in range(-ndim, 0):
            for_left = -axis <= left.ndim and left.shape[axis] > 1 and left.stride(axis) != 0
            for_right = -axis <= right.ndim and right.shape[axis] > 1 and right.stride(axis) != 0
            if not for_left and not for_right:
                left = left.narrow(axis, 0, 1) if -axis <= left.ndim and left.shape[axis] > 1 else left
                right = right.narrow(axis, 0, 1) if -axis <= right.ndim and right.shape[axis] > 1 else right
        if left.shape != right.shape:
            left, right = torch.broadcast_tensors(left, right)
        self._left.append(left.reshape(-1))
        self._right.append(right.reshape(-1))
        self._why.append(why)

    def unite_along(self, layer: Tensor, axes: Sequence[int], why: int) -> Tensor:
        """State that `layer` is constant along `axes`; return it so."""
        shape, layer = layer.shape, inhabited(layer)
        first = layer
        for axis in axes:
            if layer.shape[axis] > 1 and layer.stride(axis) != 0:
                first = first.narrow(axis, 0, 1)
        if first is not layer:
            self.unite(layer, first, why)
        return first.expand(shape)

    def freeze(self, layer: Tensor, why: int) -> None:
        """State that nothing in `layer` can be removed."""
        labels = narrowed(inhabited(layer)).reshape(-1)
        if len(labels) > self.count:
            # Many places of few channels: each once.
            seen = torch.zeros(self.count, dtype=torch.bool)
            seen[labels] = True
            labels = seen.nonzero().view(-1)
        self._left.append(labels)
        self._right.append(_NOBODY.expand(labels.shape))
        self._why.append(why)

    def pairs(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return the unions made so far with the call that asked for each."""
        return list(zip(self._left, self._right, self._why, strict=True))

    def solve(self) -> np.ndarray:
        """Return for every label the smallest label it is the same as (0: fixed)."""
        roots = np.arange(self.count)
        if not self._left:
            return roots
        left, right = torch.cat(self._left).numpy(), torch.cat(self._right).numpy()
        different = left != right
        left, right = left[different], right[different]
        ones = np.ones(len(left), dtype=np.int8)
        graph = coo_matrix((ones, (left, right)), shape=(self.count, self.count))
        number, component = connected_components(graph, directed=False)
        # Labels grow: the first of a component is its smallest.
        smallest = np.empty(number, dtype=np.int64)
        smallest[component[::-1]] = roots[::-1]
        return smallest[component]
