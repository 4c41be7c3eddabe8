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

    `tensors` holds them as int64 tensors; slots that keep the same indices share one. `last` holds the last index of
    those tensors, by id, that are known to hold increasing numbers from 0 on.
    """

    def __init__(self, tensors: dict[Slot, Tensor], last: dict[int, int] | None = None) -> None:
        """`tensors`: increasing indices, on the CPU."""
        self.tensors = tensors
        self.last = last or {}
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
    walk = walk or Walk(model)
    by_name, last = _by_name(kept)
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, dims in by_name.items():
        table, leaf = walk.place(name)
        old = table[leaf]
        found.append((table, leaf, old))
        shape = old.shape
        for dim, index in dims.items():
            if not 0 <= dim < len(shape):
                raise StructureError(f"{name!r} has {len(shape)} dimensions; the edit asks for dimension {dim}.")
            end = last.get(id(index))
            if end is None:
                end = last[id(index)] = _last(name, index)
            if end >= shape[dim]:
                raise StructureError(_not_indices(name, shape[dim]))
    if walk.shared:
        found += [(table, leaf, old) for _, _, old in found for table, leaf in walk.places[id(old)]]
    change.undo.append(lambda: _put_back(found))
    changed = change.parameters
    moved: dict[tuple[int, torch.device], Tensor] = {}
    with torch.no_grad():
        for (name, dims), (table, leaf, old) in zip(by_name.items(), found, strict=False):
            if not values:
                new = _shape_of(old, dims)
            else:
                new = _part(old, dims if old.is_cpu else _on_device(dims, old.device, moved))
            changed[name] = ParameterChange(old, new, dims)
            table[leaf] = new
        if walk.shared:
            new_of = {id(part.old): part.new for part in changed.values()}
            for table, leaf, old in found:
                table[leaf] = new_of[id(old)]
    return walk


def _by_name(kept: Mapping[Slot, tuple[int, ...]]) -> tuple[dict[str, dict[int, Tensor]], dict[int, int]]:
    """Return the indices that stay by parameter and dimension, and the last of each list that is known to be one."""
    tensors, last = (kept.tensors, dict(kept.last)) if isinstance(kept, KeptIndices) else (_as_tensors(kept), {})
    result: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in tensors.items():
        dims = result.get(name)
        if dims is None:
            result[name] = {dim: index}
        else:
            dims[dim] = index
    return result, last


def _put_back(places: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for table, leaf, old in places:
        table[leaf] = old


def _on_device(
    dims: Mapping[int, Tensor], device: torch.device, moved: dict[tuple[int, torch.device], Tensor]
) -> dict[int, Tensor]:
    """Return indices where they are needed; each list goes there once."""
    result = {}
    for dim, index in dims.items():
        there = moved.get((id(index), device))
        if there is None:
            there = moved[id(index), device] = index.to(device)
        result[dim] = there
    return result


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


def _last(name: str, index: Tensor) -> int:
    """Return the last of some indices; raises `StructureError` where they are none."""
    if not index.shape[0]:
        raise StructureError(f"the edit would leave nothing of {name!r}.")
    if int(index[0]) < 0 or (len(index) > 1 and not bool((index.diff() > 0).all())):
        raise StructureError(_not_indices(name))
    return int(index[-1])


def _not_indices(name: str, size: int | None = None) -> str:
    below = "" if size is None else f" below {size}"
    return f"the edit keeps indices of {name!r} that are not increasing numbers{below}."
