"""Appending: a new layer behind a module that stands, as a replayable edit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from convette.errors import FileFormatError
from convette.surgery._constructing import check_arguments, check_constructor, construct, listed
from convette.surgery._edits import Added, Change, find_module
from convette.surgery._placing import like_its_place, nearest, place


@dataclass(frozen=True)
class Append:
    """Put a new layer of class `constructor` (``"module:Class"``) with JSON `arguments` behind `module`.

    A plain ``nn.Sequential`` gets it as its last entry, so that its other layers keep their names; any other module
    becomes ``nn.Sequential(module, layer)``. Random weights follow from `seed` and the name. The layer is one that
    need not preserve the function (attention, dropout, inhibition); `Insert` puts in those that do.
    """

    module: str
    constructor: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    kind: ClassVar[str] = "append"
    preserves: ClassVar[bool] = False

    def apply(self, model: nn.Module) -> Change:
        """Put the layer in place; raises `StructureError`, with the model unchanged, where it cannot be made."""
        old = find_module(model, self.module)
        new = like_its_place(construct(self.constructor, self.arguments, self.seed, self.module), old, model)
        change = Change()
        if type(old) is not nn.Sequential or not self.module:
            with change.all_or_nothing():
                place(model, self.module, nn.Sequential(old, new).train(old.training), change)
            return change
        near, key = nearest(model, self.module), str(len(old))
        old._modules[key] = new
        change.undo.append(lambda: old._modules.pop(key) and None)
        for label, parameter in new.named_parameters(prefix=f"{self.module}.{key}"):
            change.added[label] = Added(parameter, near)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        arguments = {key: listed(value) for key, value in self.arguments.items()}
        return {
            "kind": self.kind,
            "module": self.module,
            "constructor": self.constructor,
            "arguments": arguments,
            "seed": self.seed,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Append":
        """Read the edit; raises `FileFormatError` where it is malformed or names a layer a file may not name."""
        module, seed = value.get("module"), value.get("seed", 0)
        if not isinstance(module, str) or not module:
            raise FileFormatError("an 'append' edit must name a module.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise FileFormatError("an 'append' edit has a seed (a whole number).")
        return Append(
            module, check_constructor(value.get("constructor")), check_arguments(value.get("arguments", {})), seed
        )
