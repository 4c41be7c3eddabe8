"""Folding layers that know by themselves what they are at inference (`convette.layers.Foldable`), as logged edits."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from convette.errors import ConvetteError, FileFormatError, StructureError
from convette.layers import Stays, folded_form
from convette.surgery._constructing import (
    check_arguments,
    check_constructor,
    construct,
    constructor_name,
    from_attributes,
    is_plain,
    listed,
)
from convette.surgery._edits import Change, find_module
from convette.surgery._placing import like_its_place, place

_valueless: ContextVar[bool] = ContextVar("valueless", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Within the block models are rebuilt whose tensors come later: an edit must not ask for their values."""
    token = _valueless.set(True)
    try:
        yield
    finally:
        _valueless.reset(token)


@dataclass(frozen=True)
class FoldLayer:
    """Put the plain layer that `module` is at inference in its place: what its method ``folded()`` returns.

    What a layer becomes can follow from what it has learned (a switchable norm that chose one of its candidates), so
    the edit says which layer that was: class `constructor` with JSON `arguments`; None where the class alone decides.
    """

    module: str
    constructor: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "fold_layer"

    def apply(self, model: nn.Module) -> Change:
        """Replace the layer; raises `StructureError`, with the model unchanged, where it is plain, must stay as it is,
        or would become something else than the edit says."""
        old = find_module(model, self.module)
        change = Change()
        if _valueless.get():
            # Loading: nothing has been learned yet, so the edit itself says what the layer became.
            made = self.constructor and construct(self.constructor, self.arguments, 0, self.module)
            new = like_its_place(made, old, model) if made else _form(self.module, old)
            if new is None:
                return change
        else:
            new = _form(self.module, old)
            if new is None:
                raise StructureError(f"cannot fold {self.module!r}: {type(old).__name__} is a plain layer already.")
            if description(self.module, new) != (self.constructor, dict(self.arguments)):
                raise StructureError(f"cannot fold {self.module!r}: it is a {type(new).__name__} here, not as logged.")
            new.train(old.training)
        with change.all_or_nothing():
            place(model, self.module, new, change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        arguments = {key: listed(value) for key, value in self.arguments.items()}
        return {"kind": self.kind, "module": self.module, "constructor": self.constructor, "arguments": arguments}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "FoldLayer":
        """Read the edit; raises `FileFormatError` where it is malformed or names a layer a file may not name."""
        module, constructor = value.get("module"), value.get("constructor")
        if not isinstance(module, str) or not module:
            raise FileFormatError("a 'fold_layer' edit must name a module.")
        name = None if constructor is None else check_constructor(constructor)
        return FoldLayer(module, name, check_arguments(value.get("arguments", {})))


def plain_forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return what the layers of `model` that know it are at inference, by name, outermost first; those that must stay
    as they are left out, what stands inside them is asked."""
    result: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in result):
            continue
        try:
            new = _form(name, module)
        except ConvetteError:
            continue
        if new is not None:
            result[name] = new
    return result


def _form(name: str, layer: nn.Module) -> nn.Module | None:
    try:
        return folded_form(layer)
    except Stays as reason:
        raise StructureError(f"cannot fold {name!r}: {reason}") from reason
    except ConvetteError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"cannot fold {name!r}: {type(layer).__name__}.folded() fails: {reason}") from error


def description(name: str, layer: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """Return class name and arguments that build a layer like `layer`; (None, {}) where none are found."""
    if list(layer.children()):
        return None, {}
    try:
        constructor = check_constructor(constructor_name(type(layer)))
        arguments = {}
        for key, item in list(inspect.signature(type(layer).__init__).parameters.items())[1:]:
            if key in ("device", "dtype") or item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL):
                continue
            found, value = from_attributes(layer, key)
            if found and is_plain(value):
                arguments[key] = listed(value)
        made = construct(constructor, arguments, 0, name)
    except (StructureError, FileFormatError):
        return None, {}
    shapes = {key: tensor.shape for key, tensor in layer.state_dict().items()}
    alike = repr(made) == repr(layer) and {k: t.shape for k, t in made.state_dict().items()} == shapes
    return (constructor, arguments) if alike else (None, {})
