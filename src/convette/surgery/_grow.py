"""Growing: channels added to a network that goes on computing what it computed."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convette.errors import FileFormatError, StructureError
from convette.surgery._attributes import set_attributes
from convette.surgery._edits import (
    Change,
    ParameterChange,
    Rewrite,
    _from_runs,
    _number,
    _runs,
    _size,
    find_module,
    find_tensor,
    holders,
    replace_tensor,
)
from convette.surgery._rewrites import free_heads, rewrite_calls
from convette.surgery._slicing import sliced
from convette.surgery._untie import Gather, Scatter

MODES = ("split", "zero_in", "zero_out")
_ROLES = ("producer", "alive", "consumer", "affine", "index")
# What a file may ask for: more is a damaged number, which would ask for all the memory there is.
_MOST_NEW = 1 << 20
_MOST_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Widening:
    """New entries along one dimension of one tensor: the places they take, and the old entry each belongs to.

    Old entries fill the other places in their order. `role` says what the dimension does for its channels: "producer"
    (rows that compute them), "alive" (the same, drawn even in the mode "zero_in", as a norm behind them is zero),
    "consumer" (columns that read them), "affine" (one value a channel), "index" (their places in an un-tied stream;
    `source` then holds the places of the new ones).
    """

    role: str
    new: tuple[int, ...]
    source: tuple[int, ...]

    def index(self, size: int) -> Tensor:
        """Return, for a dimension that was `size` long, the old entry behind each place."""
        result = torch.empty(size + len(self.new), dtype=torch.int64)
        places = torch.tensor(self.new, dtype=torch.int64)
        old = torch.ones(len(result), dtype=torch.bool)
        old[places] = False
        result[old] = torch.arange(size)
        result[places] = torch.tensor(self.source, dtype=torch.int64)
        return result

    def shares(self, size: int) -> Tensor:
        """Return which part of its old entry each place holds in a split (float64, each old entry's sum to 1).

        Parts are powers of two (1/2, 1/2; 1/2, 1/4, 1/4; ...): scaling by them is exact, so that it can be undone.
        """
        index = self.index(size)
        result = torch.ones(len(index), dtype=torch.float64)
        counts = torch.bincount(index, minlength=size)
        for entry in (counts > 1).nonzero().view(-1).tolist():
            places = (index == entry).nonzero().view(-1)
            # The old entry comes first whatever its place: it keeps the largest part.
            first = places[~torch.isin(places, torch.tensor(self.new))]
            order = torch.cat([first, places[places != first]])
            result[order] = torch.tensor(parts(len(order)), dtype=torch.float64)
        return result


def parts(count: int) -> list[float]:
    """Return `count` powers of two, largest first, that add up to 1."""
    level = int(math.log2(count))
    small = count - (1 << level)
    return [2.0**-level] * ((1 << level) - small) + [2.0 ** -(level + 1)] * (2 * small)


@dataclass(frozen=True)
class Grow:
    """Add channels: new entries along dimensions of parameters and buffers, and what modules must know of it.

    `mode` says how the network goes on computing the same: "split" (Net2Wider, arXiv 1511.05641: a new channel is a
    copy of its source and what reads them is divided among them), "zero_out" (new channels are drawn at random and
    read with weight zero) or "zero_in" (new channels are zero and read with random weights; needs activations that
    keep zero). `noise` moves weights from one copy to another in a split, ``W_source - d``, ``W_copy + d`` with d
    normal of standard deviation ``noise / sqrt(fan_in)``. Everything random follows from `seed` and the parameter's
    name and shape. `preserves` is False where the network was allowed to change (statistics over the new channels).

    Gradients, optimiser state: a split copies them to the new entries (gradients are those of the grown network as
    long as `noise` is 0), the zero modes leave zeros there. Old entries are untouched but for the division.
    """

    widened: Mapping[tuple[str, int], Widening]
    mode: str = "split"
    seed: int = 0
    noise: float = 0.0
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    free_heads: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    preserves: bool = True
    kind: ClassVar[str] = "grow"

    def apply(self, model: nn.Module) -> Change:
        """Widen the parameters, buffers and gradients of `model` and set the sizes its modules hold.

        Raises `StructureError`, with the model unchanged, where the edit does not fit the model.
        """
        change = Change()
        with change.all_or_nothing():
            _widen(model, self, change)
            set_attributes(model, self.attributes, change)
            free_heads(model, self.free_heads, change)
            rewrite_calls(model, self.rewrites, change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object; equal widenings are written once, places as runs ``[first, last]``."""
        table: dict[Widening, int] = {}
        slots: dict[str, dict[str, int]] = {}
        for (name, dim), item in self.widened.items():
            slots.setdefault(name, {})[str(dim)] = table.setdefault(item, len(table))
        return {
            "kind": self.kind,
            "mode": self.mode,
            "seed": self.seed,
            "noise": self.noise,
            "widened": slots,
            "entries": [{"role": w.role, "new": _runs(w.new), "source": list(w.source)} for w in table],
            "attributes": {module: dict(values) for module, values in self.attributes.items()},
            "free_heads": list(self.free_heads),
            "rewrites": [item.to_json() for item in self.rewrites],
            "preserves": self.preserves,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Grow":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        try:
            table = [_widening(entry) for entry in value["entries"]]
            widened = {
                (str(name), int(dim)): table[_index(number, len(table))]
                for name, dims in value["widened"].items()
                for dim, number in dims.items()
            }
            attributes = {
                str(module): {str(key): _size(item) for key, item in values.items()}
                for module, values in value.get("attributes", {}).items()
            }
            rewrites = tuple(_rewrite(item) for item in value.get("rewrites", []))
            heads = tuple(str(name) for name in value.get("free_heads", []))
            mode, seed, noise = value["mode"], value.get("seed", 0), _number(value.get("noise", 0.0))
            preserves = value.get("preserves", True)
            if mode not in MODES:
                raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
                raise ValueError(f"not a seed: {seed!r}")
            if not 0 <= noise <= 1 or not isinstance(preserves, bool):
                raise ValueError(f"noise {noise!r} must be from 0 to 1, preserves true or false")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FileFormatError(f"a 'grow' edit is malformed: {error!r}.") from error
        return Grow(widened, mode, seed, float(noise), attributes, heads, rewrites, preserves)


def _widening(entry: dict[str, Any]) -> Widening:
    new, source = _from_runs(entry["new"]), tuple(entry["source"])
    if entry["role"] not in _ROLES:
        raise ValueError(f"role {entry['role']!r} is none of {', '.join(_ROLES)}")
    if not 0 < len(new) <= _MOST_NEW or len(source) != len(new):
        raise ValueError(f"{len(new)} new entries, {len(source)} sources")
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in source):
        raise ValueError("sources must be whole numbers")
    return Widening(entry["role"], new, source)


def _index(number: Any, length: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < length:
        raise ValueError(f"no entry {number!r}")
    return number


def _rewrite(item: dict[str, Any]) -> Rewrite:
    sizes = tuple(tuple(_number(size) for size in row) for row in item["sizes"])
    return Rewrite(str(item["module"]), str(item["function"]), int(item["occurrence"]), str(item["kind"]), sizes)


# Carrying it out ------------------------------------------------------------------------------------------------------


def _widen(model: nn.Module, edit: Grow, change: Change) -> None:
    by_name: dict[str, dict[int, Widening]] = {}
    for (name, dim), item in edit.widened.items():
        by_name.setdefault(name, {})[dim] = item
    places = holders(model)
    for name, dims in by_name.items():
        old = find_tensor(model, name)
        _check(model, name, dims, old)
        index = {dim: _behind(item, old.shape[dim]) for dim, item in dims.items()}
        new = sliced(old.detach(), index)
        _fill(new, old.shape, name, dims, edit)
        if isinstance(old, nn.Parameter):
            fresh = nn.Parameter(new, requires_grad=old.requires_grad)
            if old.grad is not None:
                fresh.grad = _grown_gradient(old.grad, index, dims, edit)
            new = fresh
        # In the zero modes new entries descend from none: -1 tells those who carry state to put zeros there.
        kept = {dim: item if edit.mode == "split" else _orphaned(item, dims[dim]) for dim, item in index.items()}
        change.parameters[name] = ParameterChange(old, new, kept)
        replace_tensor(places[id(old)], old, new, change)


def _check(model: nn.Module, name: str, dims: Mapping[int, Widening], tensor: Tensor) -> None:
    elements = 1
    for dim, size in enumerate(tensor.shape):
        elements *= size + (len(dims[dim].new) if dim in dims else 0)
    if elements > _MOST_ELEMENTS:
        raise StructureError(f"the edit would make {name!r} {elements:,} numbers large.")
    for dim, item in dims.items():
        if not 0 <= dim < tensor.ndim:
            raise StructureError(f"{name!r} has {tensor.ndim} dimensions; the edit asks for dimension {dim}.")
        size = tensor.shape[dim]
        increasing = all(a < b for a, b in zip(item.new, item.new[1:], strict=False))
        if not item.new or not increasing or item.new[0] < 0 or item.new[-1] >= size + len(item.new):
            raise StructureError(f"the edit's new places in {name!r} are not increasing numbers within its new size.")
        if item.role == "index":
            _check_places(model, name, item)
        elif len(item.source) != len(item.new) or min(item.source) < 0 or max(item.source) >= size:
            raise StructureError(f"the edit copies entries that {name!r}, {size} long, does not have.")


def _check_places(model: nn.Module, name: str, item: Widening) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = find_module(model, owner)
    if not isinstance(holder, Gather | Scatter) or leaf != "index":
        raise StructureError(f"the edit adds places of a stream to {name!r}, which holds none.")
    named = [*holder.index.tolist(), *item.source]
    if len(item.source) != len(item.new) or len(set(named)) < len(named) or max(item.source) >= holder.width:
        raise StructureError(f"the edit adds places to {name!r} that it names already or the stream does not have.")


def _orphaned(index: Tensor, item: Widening) -> Tensor:
    return index.index_fill(0, torch.tensor(item.new), -1)


def along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return `vector` shaped to be multiplied along `dim` of `like`, in its dtype and on its device."""
    return vector.to(like).view([-1 if axis == dim else 1 for axis in range(like.ndim)])


def _behind(item: Widening, size: int) -> Tensor:
    """Return the old entry behind each place; new places in a stream have none, and are written by `_fill`."""
    if item.role == "index":
        item = dataclasses.replace(item, source=(0,) * len(item.new))
    return item.index(size)


def _fill(new: Tensor, shape: Sequence[int], name: str, dims: Mapping[int, Widening], edit: Grow) -> None:
    if not new.is_floating_point():
        for item in dims.values():
            if item.role == "index":
                new[list(item.new)] = torch.tensor(item.source, device=new.device)
        return
    draw = torch.Generator().manual_seed((edit.seed * 1_000_003 + zlib.crc32(name.encode())) % (1 << 63))
    if edit.mode == "split":
        for dim, item in dims.items():
            if item.role == "consumer":
                new.mul_(along(item.shares(shape[dim]), dim, new))
                if edit.noise:
                    _move_weights(new, dim, item, shape[dim], edit.noise, draw)
        return
    drawn, nought = ("producer", "consumer") if edit.mode == "zero_out" else ("consumer", "producer")
    # Zeros last: an entry that is new in two dimensions must be zero as soon as one of them asks for it.
    for dim, item in dims.items():
        if item.role in (drawn, "alive") and new.ndim > 1:
            places = torch.tensor(item.new, device=new.device)
            new.index_copy_(dim, places, _random(new, dim, len(item.new), draw))
        elif edit.mode == "zero_out" and (item.role == drawn or name.endswith(("running_mean", "running_var"))):
            new.index_fill_(dim, torch.tensor(item.new, device=new.device), float(name.endswith("running_var")))
    for dim, item in dims.items():
        if item.role == nought or (item.role == "affine" and edit.mode == "zero_in"):
            value = float(name.endswith("running_var"))
            new.index_fill_(dim, torch.tensor(item.new, device=new.device), value)


def fan_in(tensor: Tensor) -> int:
    """Return how many numbers each row of a weight reads."""
    return max(1, tensor[0].numel()) if tensor.ndim > 1 else 1


def _random(new: Tensor, dim: int, count: int, draw: torch.Generator) -> Tensor:
    shape = [count if axis == dim else size for axis, size in enumerate(new.shape)]
    return (torch.randn(shape, generator=draw) * math.sqrt(2 / fan_in(new))).to(new)


def _move_weights(new: Tensor, dim: int, item: Widening, size: int, noise: float, draw: torch.Generator) -> None:
    shape = [len(item.new) if axis == dim else length for axis, length in enumerate(new.shape)]
    moved = (torch.randn(shape, generator=draw) * (noise / math.sqrt(fan_in(new)))).to(new)
    new.index_add_(dim, torch.tensor(item.new, device=new.device), moved)
    new.index_add_(dim, old_places(item, size)[list(item.source)].to(new.device), -moved)


def old_places(item: Widening, size: int) -> Tensor:
    """Return where the old entries of a dimension that was `size` long are now."""
    old = torch.ones(size + len(item.new), dtype=torch.bool)
    old[list(item.new)] = False
    return old.nonzero().view(-1)


def _grown_gradient(gradient: Tensor, index: dict[int, Tensor], dims: Mapping[int, Widening], edit: Grow) -> Tensor:
    grown = sliced(gradient, index)
    for dim, item in dims.items():
        if edit.mode != "split":
            grown.index_fill_(dim, torch.tensor(item.new, device=grown.device), 0)
        elif item.role != "consumer":
            # What reads a channel was divided, and with it what comes back to those that make it.
            grown.mul_(along(item.shares(gradient.shape[dim]), dim, grown))
    return grown


# Undoing a split ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Multiply entries along dimensions of parameters: ``factors[name, dim]`` lists (entry, factor)."""

    factors: Mapping[tuple[str, int], tuple[tuple[int, float], ...]]
    preserves: bool = False
    kind: ClassVar[str] = "scale"

    def apply(self, model: nn.Module) -> Change:
        """Put scaled copies in place of the parameters; raises `StructureError` where an entry is not there."""
        change = Change()
        places = holders(model)
        with change.all_or_nothing():
            for (name, dim), pairs in self.factors.items():
                old = find_tensor(model, name)
                if not 0 <= dim < old.ndim or any(not 0 <= entry < old.shape[dim] for entry, _ in pairs):
                    raise StructureError(f"the edit scales entries that {name!r} does not have.")
                vector = torch.ones(old.shape[dim], dtype=torch.float64)
                for entry, factor in pairs:
                    vector[entry] = factor
                new = old.detach() * along(vector, dim, old)
                if isinstance(old, nn.Parameter):
                    grad = old.grad
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                    new.grad = grad
                earlier = change.parameters.get(name)
                change.parameters[name] = ParameterChange(old if earlier is None else earlier.old, new, {})
                held = places.pop(id(old))
                places[id(new)] = held
                replace_tensor(held, old, new, change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        rows = [[name, dim, [list(pair) for pair in pairs]] for (name, dim), pairs in self.factors.items()]
        return {"kind": self.kind, "factors": rows, "preserves": self.preserves}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Scale":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        try:
            factors = {(str(name), int(dim)): tuple(map(_pair, pairs)) for name, dim, pairs in value["factors"]}
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"a 'scale' edit is malformed: {error!r}.") from error
        return Scale(factors, value.get("preserves") is True)


def _pair(pair: Iterable[Any]) -> tuple[int, float]:
    entry, factor = pair
    if isinstance(entry, bool) or not isinstance(entry, int) or not math.isfinite(_number(factor)):
        raise ValueError(f"not an entry and its factor: {[entry, factor]}")
    return entry, float(factor)
