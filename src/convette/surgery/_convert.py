"""Converting: a layer replaced by a sibling, with what it has learned: as the new layer says, or by name and shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convette.errors import ConvetteError, FileFormatError, StructureError
from convette.layers import TakesOver
from convette.surgery._constructing import check_arguments, check_constructor, construct, listed
from convette.surgery._edits import Change, find_module
from convette.surgery._fold import _remains
from convette.surgery._placing import like_its_place, place


@dataclass(frozen=True)
class Convert:
    """Replace `module` by a new layer of class `constructor` (``"module:Class"``) made with JSON `arguments`.

    A new layer with a method ``take_over(old)`` (`convette.layers.TakesOver`) fetches what the old one has learned
    itself. Parameters and buffers that both call the same and shape the same stay the same objects, unless the new
    layer took something else over under that name, so that optimiser state and gradients stay too; new parameters
    join the optimiser beside those they replace (`StructureChange.migrate_optimizer`). With `keep_activation` what a
    norm does besides normalising (timm's norm-with-activation layers) goes on after the new layer. Random weights
    follow from `seed` and the name. Hooks on the old layer are lost.
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
        with change.all_or_nothing():
            place(model, self.module, new, change)
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
    """Let `new` take over from `old` if it can, and hold the very parameters and buffers that both call and shape the
    same."""
    own = _taken_over(old, new)
    modules = dict(new.named_modules())
    for buffers in (False, True):
        ours = dict(old.named_buffers() if buffers else old.named_parameters())
        for name, tensor in list(new.named_buffers() if buffers else new.named_parameters()):
            known = ours.get(name)
            if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
                continue
            if name not in own or torch.equal(known, tensor):
                owner, _, leaf = name.rpartition(".")
                table: dict[str, Any] = modules[owner]._buffers if buffers else modules[owner]._parameters
                table[leaf] = known


def _taken_over(old: nn.Module, new: nn.Module) -> set[str]:
    """Call ``new.take_over(old)`` where there is one; return the names of what that changed."""
    if not isinstance(new, TakesOver):
        return set()
    before = {name: tensor.clone() for name, tensor in _tensors(new).items()}
    try:
        with torch.no_grad():
            new.take_over(old)
    except ConvetteError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{type(new).__name__} cannot take over from {type(old).__name__}: {reason}") from error
    after = _tensors(new)
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
