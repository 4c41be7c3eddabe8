"""One walk over a network: its modules and tensors by name, and what their attributes hold, to be put back later."""

import contextlib
import gc
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from convette.surgery._caches import is_cache
from convette.surgery._calls import tensors_in
from convette.surgery._edits import find_module, find_tensor

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

    `names`: module id -> its first name. `tensors`: id of a parameter or buffer -> its first name, parameters first, as
    ``named_parameters`` and ``named_buffers`` list them; `places`: where each is held, by id: (table, key). `shared`
    tells whether a module or a tensor stands under several names.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk over `model`."""
        self.model = model
        self.modules: list[nn.Module] = []
        self.names: dict[int, str] = {}
        self.shared = False
        self._visit(model, "")
        self.by_name = dict(zip(self.names.values(), self.modules, strict=True))
        self.tensors: dict[int, str] = {}
        self.places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        # The tensors are held so that their ids stay theirs.
        self._by_name: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            for name, module in self.by_name.items():
                table = module.__dict__[kind]
                for leaf, tensor in table.items():
                    if tensor is None:
                        continue
                    key = id(tensor)
                    full = f"{name}.{leaf}" if name else leaf
                    self._by_name[full] = tensor
                    if key in self.tensors:
                        self.shared = True
                        self.places[key].append((table, leaf))
                    else:
                        self.tensors[key] = full
                        self.places[key] = [(table, leaf)]

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
                    self.shared = True
                else:
                    self._visit(child, prefix + leaf)

    def find(self, name: str) -> Tensor:
        """Return the parameter or buffer called `name`; raises `StructureError` where there is none."""
        tensor = self._by_name.get(name)
        return find_tensor(self.model, name) if tensor is None else tensor

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
