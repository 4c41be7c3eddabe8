"""One walk over a network: its modules and tensors by name, and what their attributes hold, to be put back later."""

import contextlib
import functools
import gc
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from convette.errors import StructureError
from convette.surgery._caches import is_cache
from convette.surgery._calls import tensors_in
from convette.surgery._edits import find_module

_PLAIN = frozenset([int, bool, float, str, type(None)])


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Put off Python's search for unreachable objects: it would go through everything that was ever imported."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


class Walk:
    """Every module, parameter and buffer of a network, found in one go (PyTorch's own listings take a walk each).

    `names`: module id -> its first name; `by_name` the other way round.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk over `model`."""
        self.model = model
        self.modules: list[nn.Module] = []
        self.names: dict[int, str] = {}
        self._twice = False
        self._visit(model, "")
        self.by_name = dict(zip(self.names.values(), self.modules, strict=True))

    @functools.cached_property
    def shared(self) -> bool:
        """Whether a module or a tensor stands under several names."""
        held = [
            id(tensor)
            for module in self.modules
            for table in (module.__dict__["_parameters"], module.__dict__["_buffers"])
            for tensor in table.values()
            if tensor is not None
        ]
        return self._twice or len(set(held)) < len(held)

    @functools.cached_property
    def tensors(self) -> dict[int, str]:
        """Id of a parameter or buffer -> its first name, parameters first, as PyTorch lists them."""
        result: dict[int, str] = {}
        # The tensors are held so that their ids stay theirs.
        self._held: list[Tensor] = []
        for kind in ("_parameters", "_buffers"):
            for name, module in self.by_name.items():
                prefix = f"{name}." if name else ""
                for leaf, tensor in module.__dict__[kind].items():
                    if tensor is not None and id(tensor) not in result:
                        result[id(tensor)] = prefix + leaf
                        self._held.append(tensor)
        return result

    def _visit(self, module: nn.Module, name: str) -> None:
        self.names[id(module)] = name
        self.modules.append(module)
        children = module.__dict__["_modules"]
        if children:
            prefix = f"{name}." if name else ""
            for leaf, child in children.items():
                if child is None:
                    continue
                if id(child) in self.names:
                    self._twice = True
                else:
                    self._visit(child, prefix + leaf)

    def find(self, name: str) -> Tensor:
        """Return the parameter or buffer called `name`; raises `StructureError` where there is none."""
        table, leaf = self.place(name)
        return table[leaf]

    def place(self, name: str) -> tuple[dict[str, Any], str]:
        """Return where the parameter or buffer called `name` is held: (table, key)."""
        owner, _, leaf = name.rpartition(".")
        module = self.module(owner)
        for kind in ("_parameters", "_buffers"):
            table = module.__dict__[kind]
            if table.get(leaf) is not None:
                return table, leaf
        raise StructureError(f"the model has no parameter or buffer {name!r}.")

    @functools.cached_property
    def places(self) -> dict[int, list[tuple[dict[str, Any], str]]]:
        """Id of a parameter or buffer -> every place that holds it: (table, key)."""
        result: dict[int, list[tuple[dict[str, Any], str]]] = {key: [] for key in self.tensors}
        for module in self.modules:
            for table in (module.__dict__["_parameters"], module.__dict__["_buffers"]):
                for leaf, tensor in table.items():
                    if tensor is not None:
                        result[id(tensor)].append((table, leaf))
        return result

    @functools.cached_property
    def _aliases(self) -> dict[int, list[str]]:
        result: dict[int, list[str]] = {}
        for listed in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in listed(remove_duplicate=False):
                result.setdefault(id(tensor), []).append(name)
        return result

    def names_of(self, name: str) -> list[str]:
        """Return every name of the parameter or buffer called `name`."""
        return self._aliases.get(id(self.find(name)), [name]) if self.shared else [name]

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`; raises `StructureError` where there is none."""
        module = self.by_name.get(name)
        return find_module(self.model, name) if module is None else module


class Kept:
    """What the modules of a network hold as attributes, and in lists and dicts among these, at one time.

    A forward may keep things on its module (a table of biases, the anchors of an image size). `restore` puts every
    attribute back, so that a run leaves nothing behind; `tensors` are those held outside parameters and buffers.
    """

    def __init__(self, walk: Walk) -> None:
        """Remember the attributes of the modules of `walk`."""
        self.tensors: list[Tensor] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._caches: list[dict[Any, Any]] = []
        for module in walk.modules:
            if type(module).__module__.startswith("torch.nn."):
                continue  # PyTorch's own modules keep nothing.
            own = vars(module)
            self._dicts.append((own, own.copy()))
            self._dicts.append((own["_buffers"], own["_buffers"].copy()))
            for name, value in own.items():
                if type(value) in _PLAIN or name[0] == "_":
                    continue
                if isinstance(value, dict):
                    self._dicts.append((value, value.copy()))
                    if value and is_cache(name, value):
                        self._caches.append(value)
                elif isinstance(value, list):
                    self._lists.append((value, value.copy()))
                elif not isinstance(value, Tensor | tuple):
                    continue
                tensors_in(value, self.tensors)

    def forget(self) -> None:
        """Empty the tables that were kept from earlier runs (see `is_cache`); `restore` puts them back."""
        for value in self._caches:
            value.clear()

    def restore(self) -> None:
        """Put every attribute back as it was."""
        for own, before in self._dicts:
            if len(own) != len(before) or not all(map(operator.is_, own.values(), before.values())):
                own.clear()
                own.update(before)
        for own, before in self._lists:
            own[:] = before
