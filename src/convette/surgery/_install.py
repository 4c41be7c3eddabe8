"""Installing: a system that places itself in a network (`convette.layers.is_placing`), as one edit that is data.

WeightAlign reparameterises convolutions, IBN-Net changes the norms of shallow blocks, consistent normalization rewrites
residual blocks: which layers that touches is the system's to know. The edit names its placing function and arguments.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convette._symbols import load_symbol
from convette.errors import ConvetteError, FileFormatError, StructureError
from convette.layers import is_placing
from convette.surgery._constructing import _tupled, check_arguments, check_constructor, listed
from convette.surgery._edits import Added, Change, ParameterChange


@dataclass(frozen=True)
class Install:
    """Let the placing function `function` (``"module:name"``) change the network, with JSON `arguments`.

    Parameters that the function keeps stay the same objects, with gradients and optimiser state; new ones join the
    optimiser beside what is nearest. Random numbers it draws follow from `seed`.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    kind: ClassVar[str] = "install"
    preserves: ClassVar[bool] = False

    def apply(self, model: nn.Module) -> Change:
        """Change the network; raises, with the model unchanged, where the function refuses."""
        function = placing_function(self.function)
        snapshot = _Snapshot(model)
        change = Change(undo=[snapshot.restore])
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.seed + zlib.crc32(self.function.encode())) % (1 << 63))
                result = function(model, **{key: _tupled(value) for key, value in self.arguments.items()})
            if result is not model:
                raise StructureError(f"{self.function} gives another network instead of changing this one.")
        except ConvetteError:
            change.revert()
            raise
        except Exception as error:
            change.revert()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise StructureError(f"{self.function} cannot change this network: {reason}") from error
        except BaseException:
            change.revert()
            raise
        snapshot.note(model, change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        arguments = {key: listed(value) for key, value in self.arguments.items()}
        return {"kind": self.kind, "function": self.function, "arguments": arguments, "seed": self.seed}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Install":
        """Read the edit; raises `FileFormatError` where it is malformed or names what a file may not name."""
        name = check_constructor(value.get("function"))
        if not name.startswith("convette.layers."):
            raise FileFormatError(f"a file may only let functions of convette.layers change a network, not {name!r}.")
        arguments, seed = check_arguments(value.get("arguments", {})), value.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise FileFormatError("an 'install' edit has a seed (a whole number).")
        try:
            placing_function(name)
        except StructureError as error:
            raise FileFormatError(str(error)) from error
        return Install(name, arguments, seed)


def placing_function(name: str) -> Any:
    """Return the placing function ``"module:name"``; raises `StructureError` where there is none."""
    try:
        found = load_symbol(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StructureError(f"there is no function {name!r} ({error}).") from error
    if not is_placing(found):
        raise StructureError(f"{name!r} is no function that places layers in a network.")
    return found


class _Snapshot:
    """Everything a function may change in a network: the attributes and classes of its modules, and all values."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, type(module), _copied(vars(module))) for module in model.modules()]
        self.parameters = dict(model.named_parameters())
        tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.values = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors]

    def restore(self) -> None:
        for module, kind, attributes in self.modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_copied(attributes))
        with torch.no_grad():
            for tensor, value, trained in self.values:
                tensor.requires_grad_(trained)
                tensor.copy_(value)

    def note(self, model: nn.Module, change: Change) -> None:
        """Write down which parameters are gone and which came."""
        known = {id(parameter) for parameter in self.parameters.values()}
        now = dict(model.named_parameters())
        stay = {id(parameter) for parameter in now.values()}
        for label, parameter in self.parameters.items():
            if id(parameter) not in stay:
                change.parameters[label] = ParameterChange(parameter, None, {})
        for label, parameter in now.items():
            if id(parameter) not in known:
                change.added[label] = Added(parameter, _neighbour(label, now, known))


def _neighbour(label: str, parameters: Mapping[str, Tensor], known: set[int]) -> Tensor | None:
    """Return the parameter, of those there were before, that a new one called `label` stands nearest to."""
    path = label
    while path:
        path = path.rpartition(".")[0]
        for name, parameter in parameters.items():
            if name.startswith(f"{path}." if path else "") and id(parameter) in known and parameter.requires_grad:
                return parameter
    return None


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `attributes` with tables of their own, so that neither side sees the other's changes."""
    return {key: value.copy() if isinstance(value, dict | set | list) else value for key, value in attributes.items()}
