"""From policies (which class becomes which) to `Convert` edits: choosing layers, deriving their arguments."""

import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from convette._progress import note
from convette.errors import StructureError, did_you_mean
from convette.layers import find_layer, is_layer
from convette.layers._stages import stages
from convette.layers._watching import call, hooked
from convette.surgery._apply import StructureChange, apply
from convette.surgery._constructing import constructor_name, from_attributes, is_plain, layer_class, listed
from convette.surgery._convert import Convert
from convette.surgery._edits import Edit
from convette.surgery._guessing import guessed_image
from convette.surgery._placing import is_block
from convette.surgery._trace import evaluating
from convette.surgery._trial import output_shapes, with_edits

WHERE = ("all", "stem", "head", "first in block", "last in block", "first in stage", "last in stage")
# What layers call the number of their channels, and the other names one layer has for the same thing as another.
_CHANNELS = (
    *("num_features", "num_channels", "channels", "normalized_shape", "dim", "features", "in_channels", "in_features"),
    *("in_chs", "in_planes", "inplanes", "planes", "width", "num_parameters", "out_channels", "out_features"),
)


@dataclass(frozen=True)
class Replacement:
    """The layer to put in: its class (or ``"module:Class"``) and arguments that are not taken from the old layer."""

    constructor: type[nn.Module] | str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keep_activation: bool = True


Policies = Mapping[type[nn.Module] | str, type[nn.Module] | str | Replacement]


def convert(
    model: nn.Module,
    policies: Policies,
    example: Any = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    where: str = "all",
    seed: int = 0,
    optimizers: Iterable[Optimizer] = (),
) -> StructureChange:
    """Replace layers of `model` in place, as its log records: ``convert(model, {nn.BatchNorm2d: MyNorm2d})``.

    Arguments as for `convert_edits`. `optimizers` then train the new parameters in the groups of those they replace.
    With an `example` the converted network is run on it, and every change taken back where its outputs have another
    shape. Raises `StructureError` where no layer fits or a new one cannot be made; the model is then as before.
    """
    edits = convert_edits(model, policies, example, include=include, exclude=exclude, where=where, seed=seed)
    if example is not None:
        _tried(model, edits, example)
    change = apply(model, *edits)
    for optimizer in optimizers:
        change.migrate_optimizer(optimizer)
    return change


def convert_edits(
    model: nn.Module,
    policies: Policies,
    example: Any = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    where: str = "all",
    seed: int = 0,
) -> list[Convert]:
    """Return the edits that replace the layers named by `policies`.

    `policies` maps a class (or the name of one: "BatchNorm2d") to the class that takes its place, a slug ("bnet"), a
    ``"module:Class"`` or a `Replacement` with arguments; subclasses match too, the most special policy wins.
    `include` and `exclude` are patterns of module names (``"layer?.*.bn1"``). `where` chooses among the layers left:
    one of `WHERE`; a block is the innermost module of two weighty layers or more that has a number in a sequence or a
    sibling of its class, a stage what "stage:N" of a `Conversion` is: ``layer1`` ..., or the part of one map size.
    Arguments the new class asks for are taken from the old layer's attributes of the same name or meaning; the number
    of channels, where the old layer does not say, from a run on `example` (without one: on noise of the first size of
    image that the network takes).

    A policy that fits no layer, while another does, is noted. Raises `StructureError` where nothing matches, or an
    argument is neither given nor found, `UsageError` for stages of a network in which none are found.
    """
    if where not in WHERE:
        raise StructureError(f"where {where!r}:{did_you_mean(where, WHERE)}")
    found = {name: layer for name, layer in model.named_modules() if name and _policy(layer, policies) is not None}
    found = {name: layer for name, layer in found.items() if _named(name, include, True)}
    found = {name: layer for name, layer in found.items() if not _named(name, exclude, False)}
    names = chosen_places(model, list(found), where)
    if not names:
        kinds = {type(layer).__name__ for layer in model.modules() if not list(layer.children())}
        wanted = ", ".join(key if isinstance(key, str) else key.__name__ for key in policies)
        raise StructureError(f"no layer of {type(model).__name__} fits {wanted}; it has {', '.join(sorted(kinds))}.")
    _say_unused(model, policies, [found[name] for name in names])
    channels = _Channels(model, example)
    edits = []
    for name in names:
        target = _policy(found[name], policies)
        target = target if isinstance(target, Replacement) else Replacement(target)  # type: ignore[arg-type]
        made = target.constructor
        made = _class_called(made) if isinstance(made, str) else made
        arguments = _arguments(name, found[name], made, target.arguments, channels)
        edits.append(Convert(name, constructor_name(made), arguments, seed, target.keep_activation))
    return edits


def _say_unused(model: nn.Module, policies: Policies, chosen: Sequence[nn.Module]) -> None:
    """Note the policies that fit none of the `chosen` layers: the network may call a function there, not a layer."""
    for key in policies:
        if all(_policy(layer, {key: True}) is None for layer in chosen):
            name = key if isinstance(key, str) else key.__name__
            note(f"convert: no layer chosen in {type(model).__name__} is a {name}; what is called as a function stays")


def _class_called(name: str) -> type[nn.Module]:
    """Return the layer called ``"module:Class"``, by a public name or by the slug of its system."""
    found = layer_class(name) if ":" in name else find_layer(name)
    if not is_layer(found):
        raise StructureError(f"{name!r} places itself ({found.__name__}); use convette.surgery.convert_by.")
    return found  # type: ignore[return-value]


def _tried(model: nn.Module, edits: Sequence[Edit], example: Any) -> None:
    """Run the converted network once and take it back; raise `StructureError` where its outputs have another shape."""
    before = output_shapes(model, example)
    after = with_edits(model, edits, lambda: output_shapes(model, example), "the converted network does not run")
    if before != after:
        raise StructureError(f"the converted network's outputs are {after}, not {before}.")


def _policy(layer: nn.Module, policies: Mapping[Any, Any]) -> Any:
    lineage = type(layer).__mro__
    best: tuple[int, Any] | None = None
    for key, value in policies.items():
        for depth, kind in enumerate(lineage):
            if kind is key or (isinstance(key, str) and kind.__name__ == key):
                best = (depth, value) if best is None or depth < best[0] else best
                break
    return None if best is None else best[1]


def _named(name: str, patterns: str | Sequence[str] | None, default: bool) -> bool:
    if patterns is None:
        return default
    return any(fnmatch.fnmatchcase(name, item) for item in ([patterns] if isinstance(patterns, str) else patterns))


# Places ---------------------------------------------------------------------------------------------------------------


def chosen_places(model: nn.Module, names: list[str], where: str) -> list[str]:
    """Return those of `names` (in the model's order) that stand at the place `where`, see `convert_edits`."""
    if where == "all":
        return names
    if where.endswith("stage"):
        within = [[name for name in names if stage.holds(name)] for stage in stages(model)]
        return [group[0 if where.startswith("first") else -1] for group in within if group]
    block_of = {name: enclosing_block(model, name) for name in names}
    inside = [name for name, _ in model.named_modules() if enclosing_block(model, name)]
    order = {name: k for k, (name, _) in enumerate(model.named_modules())}
    if where in ("stem", "head"):
        first = order[inside[0]] if inside else len(order)
        return [name for name in names if not block_of[name] and (order[name] < first) == (where == "stem")]
    held: dict[str, list[str]] = {}
    for name in names:
        if block_of[name]:
            held.setdefault(block_of[name], []).append(name)
    return [group[0 if where.startswith("first") else -1] for group in held.values()]


def enclosing_block(model: nn.Module, name: str) -> str:
    """Return the innermost block around a module, "" where there is none."""
    path = name.rpartition(".")[0]
    while path and not is_block(model, path):
        path = path.rpartition(".")[0]
    return path


# Arguments ------------------------------------------------------------------------------------------------------------


class _Channels:
    """The number of channels each layer reads, by a run on the example, made when first asked for."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.known: dict[int, int] | None = None

    def of(self, layer: nn.Module) -> int | None:
        if self.known is None:
            self.known = {}
            if self.example is None:
                # Channels are the same at any size, so any image will do.
                self.example = guessed_image(self.model)
            if self.example is not None:
                self._run()
        return self.known.get(id(layer))

    def _run(self) -> None:
        known: dict[int, int] = {}

        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim > 1:
                known[id(layer)] = args[0].shape[1 if args[0].ndim > 3 else -1]

        handles = [layer.register_forward_pre_hook(note) for layer in self.model.modules()]
        with hooked(handles), evaluating(self.model):
            call(self.model, self.example)
        self.known = known


def _arguments(
    name: str, old: nn.Module, made: type[nn.Module], given: Mapping[str, Any], channels: _Channels
) -> dict[str, Any]:
    signature = inspect.signature(made.__init__).parameters
    open_ended = any(item.kind is item.VAR_KEYWORD for item in signature.values())
    for key in given:
        if key not in signature and not open_ended:
            raise StructureError(f"{made.__name__} takes no argument {key!r}.{did_you_mean(key, list(signature)[1:])}")
    result = {key: listed(value) for key, value in given.items()}
    if not all(is_plain(value) for value in result.values()):
        raise StructureError(
            f"{made.__name__}: arguments must be numbers, texts or lists of them, so that they can be written."
        )
    for key, item in list(signature.items())[1:]:
        if key in given or key in ("device", "dtype") or item.kind in (item.VAR_KEYWORD, item.VAR_POSITIONAL):
            continue
        found, value = from_attributes(old, key)
        if found:
            result[key] = listed(value)
        elif item.default is item.empty:
            result[key] = _required(name, old, made, key, channels)
    return result


def _required(name: str, old: nn.Module, made: type[nn.Module], key: str, channels: _Channels) -> Any:
    if key in _CHANNELS:
        for attribute in _CHANNELS:
            value = getattr(old, attribute, None)
            value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        count = channels.of(old)
        if count is not None:
            return count
    if key == "num_groups":
        width = _required(name, old, made, "num_channels", channels)
        return next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0)
    hint = "give it in a Replacement" + (", or an example to run" if key in _CHANNELS else "")
    raise StructureError(
        f"{made.__name__} for {name!r} needs {key!r}, which {type(old).__name__} does not have; {hint}."
    )
