"""One walk over a network: its modules and tensors by name, and what their attributes hold, to be put back later."""

import operator
from typing import Any

from torch import Tensor, nn

from convette.surgery._calls import tensors_in


class Walk:
    """Every module, parameter and buffer of a network, found in one go (PyTorch's own listings take a walk each).

    `names`: module id -> its first name. `tensors`: id of a parameter or buffer -> its first name, parameters first, as
    ``named_parameters`` and ``named_buffers`` list them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk over `model`."""
        self.modules: list[nn.Module] = []
        self.names: dict[int, str] = {}
        self._visit(model, "")
        self.tensors: dict[int, str] = {}
        # The tensors are held so that their ids stay theirs.
        self.held: list[Tensor] = []
        for kind in ("_parameters", "_buffers"):
            for module, name in zip(self.modules, self.names.values(), strict=True):
                for leaf, tensor in module.__dict__[kind].items():
                    if tensor is not None and id(tensor) not in self.tensors:
                        self.tensors[id(tensor)] = f"{name}.{leaf}" if name else leaf
                        self.held.append(tensor)

    def _visit(self, module: nn.Module, name: str) -> None:
        self.names[id(module)] = name
        self.modules.append(module)
        children = module.__dict__["_modules"]
        if children:
            prefix = f"{name}." if name else ""
            for leaf, child in children.items():
                if child is not None and id(child) not in self.names:
                    self._visit(child, prefix + leaf)


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
        for module in walk.modules:
            own = vars(module)
            self._dicts.append((own, own.copy()))
            for name, value in own.items():
                kind = type(value)
                if kind is int or kind is bool or value is None or kind is str or kind is float:
                    continue
                if kind is dict or isinstance(value, dict):
                    if name[0] != "_" or name == "_buffers":
                        self._dicts.append((value, value.copy()))
                        if value and name[0] != "_":
                            tensors_in(value, self.tensors)
                elif kind is list:
                    self._lists.append((value, value.copy()))
                    if name[0] != "_":
                        tensors_in(value, self.tensors)
                elif name[0] != "_" and isinstance(value, Tensor | list | tuple | dict):
                    tensors_in(value, self.tensors)

    def restore(self) -> None:
        """Put every attribute back as it was."""
        for own, before in self._dicts:
            if len(own) != len(before) or not all(map(operator.is_, own.values(), before.values())):
                own.clear()
                own.update(before)
        for own, before in self._lists:
            own[:] = before
