"""Cutting parameters, buffers and gradients down to the indices that stay."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import StructureError
from convette.surgery._edits import Change, ParameterChange
from convette.surgery._slicing import sliced
from convette.surgery._walk import Walk

Slot = tuple[str, int]


class KeptIndices(Mapping[Slot, tuple[int, ...]]):
    """The indices that stay, by parameter name and dimension: a mapping to tuples, made when they are asked for.

    `tensors` holds them as int64 tensors; slots that keep the same indices share one.
    """

    def __init__(self, tensors: dict[Slot, Tensor]) -> None:
        """`tensors`: increasing indices, on the CPU."""
        self.tensors = tensors
        self._made: dict[int, tuple[int, ...]] = {}

    def __getitem__(self, slot: Slot) -> tuple[int, ...]:
        """Return the indices kept along a dimension of a parameter."""
        tensor = self.tensors[slot]
        made = self._made.get(id(tensor))
        if made is None:
            made = self._made[id(tensor)] = tuple(tensor.tolist())
        return made

    def __iter__(self) -> Iterator[Slot]:
        """Go through the slots."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return the number of slots."""
        return len(self.tensors)

    def __repr__(self) -> str:
        """Show it as the dict it stands for."""
        return repr(dict(self))

    def __reduce__(self) -> Any:
        """Copy the tensors alone: what was made of them hangs on their ids."""
        return KeptIndices, (self.tensors,)


def cut(
    model: nn.Module,
    kept: Mapping[Slot, tuple[int, ...]],
    change: Change,
    *,
    values: bool = True,
    walk: Walk | None = None,
) -> Walk:
    """Put the kept part of every parameter and buffer into its place, gradients with it, and note it in `change`.

    Without `values` the new tensors are on the meta device: shapes only. `walk`: over the model as it is, returned.
    """
    tensors = kept.tensors if isinstance(kept, KeptIndices) else _as_tensors(kept)
    walk = walk or Walk(model)
    by_name: dict[str, dict[int, Tensor]] = {}
    checked: set[tuple[int, int]] = set()
    for (name, dim), index in tensors.items():
        dims = by_name.get(name)
        if dims is None:
            dims = by_name[name] = {}
        dims[dim] = index
        shape = walk.find(name).shape
        if not 0 <= dim < len(shape):
            raise StructureError(f"{name!r} has {len(shape)} dimensions; the edit asks for dimension {dim}.")
        if (id(index), shape[dim]) not in checked:
            _check_indices(name, index, shape[dim])
            checked.add((id(index), shape[dim]))
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    change.undo.append(lambda: _put_back(places))
    with torch.no_grad():
        for name, dims in by_name.items():
            old = walk.find(name)
            new = _part(old, dims) if values else _shape_of(old, dims)
            change.parameters[name] = ParameterChange(old, new, dims)
            for table, leaf in walk.places[id(old)]:
                places.append((table, leaf, old))
                table[leaf] = new
    return walk


def _put_back(places: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for table, leaf, old in places:
        table[leaf] = old


def _part(old: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    new = sliced(old, dims)
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if old.grad is not None:
        parameter.grad = sliced(old.grad, dims)
    return parameter


def _shape_of(old: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    shape = [dims[dim].shape[0] if dim in dims else size for dim, size in enumerate(old.shape)]
    new = torch.empty(shape, dtype=old.dtype, device="meta")
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _as_tensors(kept: Mapping[Slot, tuple[int, ...]]) -> dict[Slot, Tensor]:
    made: dict[tuple[int, ...], Tensor] = {}
    result = {}
    for slot, indices in kept.items():
        tensor = made.get(indices)
        if tensor is None:
            tensor = made[indices] = torch.tensor(indices, dtype=torch.int64)
        result[slot] = tensor
    return result


def _check_indices(name: str, index: Tensor, size: int) -> None:
    if not index.shape[0]:
        raise StructureError(f"the edit would leave nothing of {name!r}.")
    if int(index[-1]) >= size or int(index[0]) < 0 or (len(index) > 1 and not bool((index.diff() > 0).all())):
        raise StructureError(f"the edit keeps indices of {name!r} that are not increasing numbers below {size}.")
