"""Converting: a layer replaced by a sibling, its weights carried over where names and shapes agree."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from convette.errors import FileFormatError
from convette.surgery._constructing import check_arguments, check_constructor, construct, listed
from convette.surgery._edits import Change, find_module
from convette.surgery._fold import _remains
from convette.surgery._placing import like_its_place, place


@dataclass(frozen=True)
class Convert:
    """Replace `module` by a new layer of class `constructor` (``"module:Class"``) made with JSON `arguments`.

    Parameters and buffers that both layers call the same and shape the same stay the same objects, so that optimiser
    state and gradients stay too; new parameters join the optimiser beside those they replace
    (`StructureChange.migrate_optimizer`). With `keep_activation` what a norm does besides normalising (timm's
    norm-with-activation layers) goes on after the new layer. Random weights follow from `seed` and the name. Hooks on
    the old layer are lost.
    """

    module: str
    constructor: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    keep_activation: bool = True
    kind: ClassVar[str] = "convert"
    preserves: ClassVar[bool] = False

    def apply(self, model: nn.Module) -> Change:
        """Put the new layer in place; raises `StructureError`, with the model unchanged, where it cannot be made."""
        old = find_module(model, self.module)
        new = like_its_place(construct(self.constructor, self.arguments, self.seed, self.module), old, model)
        carry_over(old, new)
        rest = _remains(old) if self.keep_activation else nn.Identity()
        if not isinstance(rest, nn.Identity) and not hasattr(new, "act"):
            new = nn.Sequential(new, *(rest if isinstance(rest, nn.Sequential) else [rest])).train(old.training)
        change = Change()
        try:
            place(model, self.module, new, change)
        except BaseException:
            change.revert()
            raise
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {
            "kind": self.kind,
            "module": self.module,
            "constructor": self.constructor,
            "arguments": {key: listed(value) for key, value in self.arguments.items()},
            "seed": self.seed,
            "keep_activation": self.keep_activation,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Convert":
        """Read the edit; raises `FileFormatError` where it is malformed or names a layer a file may not name."""
        module, seed, keep = value.get("module"), value.get("seed", 0), value.get("keep_activation", True)
        if not isinstance(module, str) or not module:
            raise FileFormatError("a 'convert' edit must name a module.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63 or not isinstance(keep, bool):
            raise FileFormatError("a 'convert' edit has a seed (a whole number) and keep_activation (true or false).")
        constructor = check_constructor(value.get("constructor"))
        return Convert(module, constructor, check_arguments(value.get("arguments", {})), seed, keep)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Let `new` hold the very parameters and buffers of `old` that it calls the same and shapes the same."""
    modules = dict(new.named_modules())
    for buffers in (False, True):
        ours = dict(old.named_buffers() if buffers else old.named_parameters())
        for name, tensor in list(new.named_buffers() if buffers else new.named_parameters()):
            known = ours.get(name)
            if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
                owner, _, leaf = name.rpartition(".")
                table: dict[str, Any] = modules[owner]._buffers if buffers else modules[owner]._parameters
                table[leaf] = known
