"""Edits: what was done to a network's structure, as plain data that can be written, read and done again."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from convette.errors import FileFormatError, StructureError

if TYPE_CHECKING:
    from convette.surgery._walk import Walk


@dataclass(slots=True)
class ParameterChange:
    """One parameter before and after an edit (None: gone).

    `kept` maps changed dimensions to the old index behind each new one (-1: an entry without ancestor).
    """

    old: Tensor
    new: Tensor | None
    kept: dict[int, Tensor]


@dataclass
class Added:
    """A parameter an edit brought in, and the nearest trained one it stands beside: one optimiser trains both."""

    parameter: nn.Parameter
    beside: Tensor | None


@dataclass
class Change:
    """What an edit did to a model, and how to take it back."""

    parameters: dict[str, ParameterChange] = field(default_factory=dict)
    added: dict[str, Added] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def revert(self) -> None:
        """Take the edit back: the same tensors and attributes as before."""
        while self.undo:
            self.undo.pop()()

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back what is noted here where something is raised within."""
        try:
            yield
        except BaseException:
            self.revert()
            raise


@runtime_checkable
class Edit(Protocol):
    """A change of structure: pure data, carried out by `apply`."""

    kind: ClassVar[str]

    def apply(self, model: nn.Module) -> Change:
        """Carry out the edit on `model`, or raise `StructureError` and leave it as it was."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object with its ``"kind"``."""
        ...


@dataclass(frozen=True)
class Rewrite:
    """Sizes written into a forward: in `module`, the call number `occurrence` of `function` gets new `sizes`."""

    module: str
    function: str
    occurrence: int
    kind: str
    sizes: tuple[tuple[int | float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the rewrite as a JSON object."""
        return {
            "module": self.module,
            "function": self.function,
            "occurrence": self.occurrence,
            "kind": self.kind,
            "sizes": [list(item) for item in self.sizes],
        }


@dataclass(frozen=True)
class Shrink:
    """Remove channels: the indices kept along dimensions of parameters and buffers, and what modules must know of it.

    `kept` maps a parameter's name and a dimension to the sorted indices that stay. `attributes` maps a module to the
    sizes it holds in Python; `free_heads` names the ``nn.MultiheadAttention`` whose heads become fewer than its
    width asks for; `rewrites` holds sizes written into a forward.
    """

    kept: Mapping[tuple[str, int], tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    free_heads: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    kind: ClassVar[str] = "shrink"

    def apply(self, model: nn.Module) -> Change:
        """Cut the parameters, buffers and gradients of `model` and set the sizes its modules hold.

        Raises `StructureError`, with the model unchanged, where the edit does not fit the model.
        """
        return self._applied(model, values=True)

    def apply_shapes(self, model: nn.Module, walk: "Walk | None" = None) -> Change:
        """Do the same with parameters that have shapes but no values, to see whether the network runs with them."""
        return self._applied(model, values=False, walk=walk)

    def _applied(self, model: nn.Module, values: bool, walk: "Walk | None" = None) -> Change:
        from convette.surgery._attributes import set_attributes
        from convette.surgery._caches import forget_caches, gather_weights
        from convette.surgery._cutting import cut
        from convette.surgery._rewrites import free_heads, rewrite_calls

        change = Change()
        with change.all_or_nothing():
            walk = cut(model, self.kept, change, values=values, walk=walk)
            set_attributes(model, self.attributes, change, walk.module)
            free_heads(model, self.free_heads, change)
            rewrite_calls(model, self.rewrites, change)
            sized = [walk.module(name) for name in self.attributes]
            change.undo[:0] = [lambda: forget_caches(walk.modules), lambda: gather_weights(sized)]
            forget_caches(walk.modules)
            gather_weights(sized)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object; equal index lists are written once, as runs of ``[first, last]``."""
        lists: dict[tuple[int, ...], int] = {}
        slots: dict[str, dict[str, int]] = {}
        for (name, dim), indices in self.kept.items():
            slots.setdefault(name, {})[str(dim)] = lists.setdefault(tuple(indices), len(lists))
        return {
            "kind": self.kind,
            "kept": slots,
            "indices": [_runs(indices) for indices in lists],
            "attributes": {module: dict(values) for module, values in self.attributes.items()},
            "free_heads": list(self.free_heads),
            "rewrites": [item.to_json() for item in self.rewrites],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Shrink":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        try:
            lists = [_from_runs(runs) for runs in value["indices"]]
            kept = {
                (str(name), int(dim)): lists[number]
                for name, dims in value["kept"].items()
                for dim, number in dims.items()
                if number >= 0
            }
            attributes = {
                str(module): {str(key): _size(item) for key, item in values.items()}
                for module, values in value.get("attributes", {}).items()
            }
            rewrites = tuple(
                Rewrite(
                    str(item["module"]),
                    str(item["function"]),
                    int(item["occurrence"]),
                    str(item["kind"]),
                    tuple(tuple(_number(size) for size in sizes) for sizes in item["sizes"]),
                )
                for item in value.get("rewrites", [])
            )
            heads = tuple(str(name) for name in value.get("free_heads", []))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FileFormatError(f"a 'shrink' edit is malformed: {error!r}.") from error
        return Shrink(kept, attributes, heads, rewrites)


_MOST_INDICES = 1 << 24


def _runs(indices: Sequence[int]) -> list[list[int]]:
    result = []
    for _, run in itertools.groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        result.append([members[0], members[-1]])
    return result


def _from_runs(runs: list[list[int]]) -> tuple[int, ...]:
    total = 0
    result: list[int] = []
    for first, last in runs:
        if not (isinstance(first, int) and isinstance(last, int)) or not 0 <= first <= last:
            raise ValueError(f"not a run of indices: {[first, last]}")
        total += last - first + 1
        if total > _MOST_INDICES:
            raise ValueError("more indices than any layer has")
        result.extend(range(first, last + 1))
    return tuple(result)


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"not a number: {value!r}")
    return value


def _size(value: Any) -> Any:
    """Check that `value` is a size or a list of sizes: the only things an edit may set."""
    if isinstance(value, bool) or not isinstance(value, int | list):
        raise ValueError(f"not a size: {value!r}")
    if isinstance(value, list):
        return [_size(item) for item in value]
    if not 0 <= value < 1 << 40:
        raise ValueError(f"not a size: {value!r}")
    return value


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, bool]]]:
    """Return, for every tensor of the model by id, the modules that hold it: (module, name, is it a buffer)."""
    result: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                result.setdefault(id(tensor), []).append((module, name, False))
        for name, tensor in module._buffers.items():
            if tensor is not None:
                result.setdefault(id(tensor), []).append((module, name, True))
    return result


def find_tensor(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called `name`; raises `StructureError` where there is none."""
    owner, _, leaf = name.rpartition(".")
    module = find_module(model, owner)
    tensor = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers.get(leaf)
    if tensor is None:
        raise StructureError(f"the model has no parameter or buffer {name!r}.")
    return tensor


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module called `name`; raises `StructureError` where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise StructureError(f"the model has no module {name!r}.") from error


def replace_tensor(places: list[tuple[nn.Module, str, bool]], old: Tensor, new: Tensor, change: Change) -> None:
    """Put `new` wherever `old` was held, and note how to go back."""
    for module, name, buffer in places:
        table: dict[str, Any] = module._buffers if buffer else module._parameters
        table[name] = new
        change.undo.append(lambda table=table, name=name: table.__setitem__(name, old))
