"""Conversions by name: which published system goes where in a network, as a recipe says it."""

import copy
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from convette.errors import ConvetteError, StructureError, UsageError, did_you_mean
from convette.layers import find_layer, is_layer, is_placing
from convette.layers._stages import stages
from convette.layers._watching import call, hooked
from convette.surgery._append import Append
from convette.surgery._apply import StructureChange, apply
from convette.surgery._constructing import _tupled, constructor_name, is_plain, listed
from convette.surgery._converting import WHERE, Replacement, _Channels, _required, _tried, chosen_places, convert_edits
from convette.surgery._edits import Edit
from convette.surgery._install import Install
from convette.surgery._log import structure_log

_STAGE = "stage:"


@dataclass(frozen=True)
class Conversion:
    """One thing to convert a network to: what (`by`), in place of what (`replace`) or behind what (`after`), where.

    Attributes:
        by: a catalogue slug ("sparse-switchable-normalization"), a public name ("IBN", "GroupNorm"),
            ``"module:Class"``, or the class or placing function itself.
        replace: names of the classes of layers to replace ("BatchNorm2d"), subclasses too.
        after: names of modules, patterns ("layer?"), "stage:2" or "every stage" (all but the last), to put the layer
            behind. Neither `replace` nor `after`: `by` places itself (WeightAlign, IBN-Net ...).
        where: which of the layers to replace: words of `convette.surgery.WHERE` or "stage:N" (from 1), with commas:
            each leaves those that the words before it left ("stage:2, last in block").
        include: patterns of module names to replace; empty: all.
        exclude: patterns of module names to leave.
        options: arguments of the new layer or of the placing function; what is left out is taken from the old layer.
        seed: of random weights.
    """

    by: str | type[nn.Module] | Callable[..., nn.Module]
    replace: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be said of any network: both ways at once, unknown names, places and options."""
        check_words(self.where)
        if self.replace and self.after:
            raise UsageError(f"{_called(self.by)}: replace and after were both given; a layer goes one way.")
        if not self.replace and (self.where or self.include or self.exclude):
            raise UsageError(
                f"{_called(self.by)}: where, include and exclude choose among layers; say what to replace."
            )
        target = self.target
        if is_placing(target) and (self.replace or self.after):
            raise UsageError(
                f"{_called(self.by)} places itself ({target.__name__}); leave replace and after out, its options say"
                " where." + _instead(target)
            )
        if is_layer(target) and not (self.replace or self.after):
            raise UsageError(
                f"{_called(self.by)} is a layer: say what it replaces (replace = 'BatchNorm2d') or behind which modules"
                " it goes (after = 'layer1')."
            )
        _check_options(target, self.options)

    @property
    def target(self) -> Any:
        """The class of layers or the placing function that `by` names."""
        return find_layer(self.by) if isinstance(self.by, str) else self.by


def conversion_edits(model: nn.Module, conversion: Conversion, example: Any = None) -> list[Edit]:
    """Return the edits that carry `conversion` out on `model`; the network is left as it is.

    Raises `StructureError` where nothing of the network fits, or an argument is neither given nor found.
    """
    target = conversion.target
    options = {key: listed(value) for key, value in conversion.options.items()}
    if is_placing(target):
        own = _own_edits(model, target, options, example, conversion.seed)
        return own or [Install(f"{target.__module__}:{target.__name__}", options, conversion.seed)]
    if conversion.after:
        return _behind(model, conversion, target, options, example)
    found = [
        name
        for name, layer in model.named_modules()
        if name and any(kind.__name__ in conversion.replace for kind in type(layer).__mro__)
    ]
    if not found:
        kinds = sorted({type(layer).__name__ for layer in model.modules() if not list(layer.children())})
        wanted = ", ".join(conversion.replace)
        raise StructureError(
            f"the network has no {wanted} to replace by {_called(conversion.by)}.{did_you_mean(wanted, kinds)}"
        )
    names = [name for name in found if _matches(name, conversion.include, True)]
    names = [name for name in names if not _matches(name, conversion.exclude, False)]
    for word in conversion.where:
        names = _placed(model, names, word)
    if not names:
        raise StructureError(
            f"none of the {len(found)} {', '.join(conversion.replace)} layers stands where {_called(conversion.by)} is"
            f" to go (where {', '.join(conversion.where) or 'all'}; include {', '.join(conversion.include) or '*'})."
        )
    policies: dict[type[nn.Module] | str, Any] = {kind: Replacement(target, options) for kind in conversion.replace}
    exact = [name.replace("[", "[[]") for name in names]
    return list(convert_edits(model, policies, example, include=exact, seed=conversion.seed))


def _own_edits(model: nn.Module, target: Any, options: dict[str, Any], example: Any, seed: int) -> list[Edit]:
    """Return the edits that a placing function logs by itself, found on a copy of the network; none: it logs nothing.

    A function that takes an `example` gets the one at hand. Random weights follow from `seed`.
    """
    trial = copy.deepcopy(model)
    before = len(structure_log(trial).edits)
    given = {key: _tupled(value) for key, value in options.items()}
    if "example" in inspect.signature(target).parameters:
        given.setdefault("example", example)
    try:
        target(trial, **given)
    except ConvetteError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{target.__name__} cannot change this network: {reason}") from error
    edits: list[Any] = structure_log(trial).edits[before:]
    seeded = [hasattr(edit, "seed") for edit in edits]
    return [replace(edit, seed=seed) if has else edit for edit, has in zip(edits, seeded, strict=True)]


def convert_by(model: nn.Module, *conversions: Conversion, example: Any = None) -> StructureChange:
    """Carry `conversions` out on `model` in place, in order, all or nothing; the structure log holds them as edits.

    With an `example` the converted network is run on it once, and taken back where it does not run or its outputs have
    another shape. Returns the change, which migrates optimisers and copies.
    """
    done: list[Any] = []
    edits: list[Edit] = []
    try:
        for conversion in conversions:
            for edit in conversion_edits(model, conversion, example):
                done.append(edit.apply(model))
                edits.append(edit)
    finally:
        for change in reversed(done):
            change.revert()
    if example is not None:
        _tried(model, edits, example)
    return apply(model, *edits)


def check_words(words: Sequence[str]) -> None:
    """Raise `UsageError` for a place that is none of `WHERE` and no "stage:N"."""
    for word in words:
        number = word.removeprefix(_STAGE).strip()
        if word.startswith(_STAGE):
            if not number.isdecimal() or int(number) < 1:
                raise UsageError(f"where {word!r}: stages are counted from 1, as in 'stage:2'.")
        elif word not in WHERE:
            raise UsageError(f"where {word!r}: no such place.{did_you_mean(word, [*WHERE, 'stage:1'])}")


def _placed(model: nn.Module, names: list[str], word: str) -> list[str]:
    if not word.startswith(_STAGE):
        return chosen_places(model, names, word)
    stage = _stage(model, word)
    return [name for name in names if stage.holds(name)]


def _stage(model: nn.Module, word: str) -> Any:
    found = stages(model)
    number = int(word.removeprefix(_STAGE))
    if number > len(found):
        raise StructureError(f"{word!r}: the network has {len(found)} stages.")
    return found[number - 1]


def _behind(
    model: nn.Module, conversion: Conversion, target: type[nn.Module], options: dict[str, Any], example: Any
) -> list[Edit]:
    known = [name for name, _ in model.named_modules() if name and "parametrizations" not in name.split(".")]
    names: list[str] = []
    for word in conversion.after:
        if word.startswith(_STAGE):
            check_words([word])
            found = [_stage(model, word).end]
        elif word in ("every stage", "every-stage"):
            found = [stage.end for stage in stages(model)[:-1]]
        else:
            found = [name for name in known if fnmatch.fnmatchcase(name, word)]
        if not found:
            raise StructureError(f"after {word!r}: the network has no such module.{did_you_mean(word, known)}")
        names += [name for name in found if name not in names]
    constructor = constructor_name(target)
    modules = dict(model.named_modules())
    outputs = _Outputs(model, example)
    return [
        Append(name, constructor, _needed(name, modules[name], target, options, outputs), conversion.seed)
        for name in names
    ]


def _needed(name: str, old: nn.Module, target: type, options: dict[str, Any], outputs: "_Outputs") -> dict[str, Any]:
    """Return `options` with the arguments the class asks for that follow from what stands before it."""
    result = dict(options)
    for key, item in list(inspect.signature(target.__init__).parameters.items())[1:]:
        if (
            item.default is item.empty
            and key not in result
            and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
        ):
            result[key] = _required(name, old, target, key, outputs)
    return result


class _Outputs(_Channels):
    """The number of channels each module gives, by a run on the example."""

    def _run(self) -> None:
        from torch import Tensor

        from convette.surgery._trace import evaluating

        known: dict[int, int] = {}

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1:
                known[id(layer)] = output.shape[1 if output.ndim > 3 else -1]

        handles = [layer.register_forward_hook(note) for layer in self.model.modules()]
        with hooked(handles), evaluating(self.model):
            call(self.model, self.example)
        self.known = known


def _check_options(target: Any, options: Mapping[str, Any]) -> None:
    signature = inspect.signature(target.__init__ if is_layer(target) else target).parameters
    known = [key for key in list(signature)[1:] if key not in ("device", "dtype")]
    if any(item.kind is item.VAR_KEYWORD for item in signature.values()):
        known = [*known, *options]
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"{target.__name__} takes no option {key!r}.{did_you_mean(key, known)}")
        if not is_plain(value):
            raise UsageError(f"{target.__name__}: option {key} must be a number, a text or a list of them.")


def _matches(name: str, patterns: Sequence[str], default: bool) -> bool:
    return any(fnmatch.fnmatchcase(name, item) for item in patterns) if patterns else default


def _called(by: Any) -> str:
    return repr(by) if isinstance(by, str) else by.__name__


def _instead(target: Any) -> str:
    """Return the layers of a placing function's file that can replace one, as a hint."""
    import importlib

    home = importlib.import_module(target.__module__)
    names = [
        name
        for name, value in vars(home).items()
        if is_layer(value) and value.__module__ == home.__name__ and name[0] != "_"
    ]
    return f" As layers to replace others by, it has {', '.join(names)}." if names else ""
