"""Putting attention behind stages, on residual branches or behind modules that are named."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._stages import stages
from convette.layers._watching import call, hooked
from convette.layers.normalization._residual import last_norms


def places(model: nn.Module, where: str | Sequence[str], what: str) -> list[str]:
    """Return the modules that attention is put behind: "stage", "block" (the last norm of every branch), or names."""
    if not isinstance(where, str):
        known = dict(model.named_modules())
        missing = [name for name in where if name not in known]
        if missing or not where:
            raise UsageError(f"{what}: {type(model).__name__} has no module {missing[0] if missing else 'named'!r}.")
        return list(where)
    if where == "stage":
        return [stage.end for stage in stages(model)]
    if where == "block":
        ends = {id(norm) for norm, _ in last_norms(model)}
        found = [name for name, module in model.named_modules() if id(module) in ends]
        if not found:
            raise UsageError(f"{what}: {type(model).__name__} has no residual block that ends in a batch norm.")
        return found
    raise UsageError(f"{what}: where {where!r} is none of 'stage', 'block', or a list of module names.")


def attach(
    model: nn.Module, example: Any, constructor: str, where: str | Sequence[str], options: Mapping[str, Any], what: str
) -> nn.Module:
    """Put a layer of `constructor`, made for the channels seen in a run on `example`, behind the chosen modules."""
    from convette.surgery import Append, apply

    if example is None:
        raise UsageError(f"{what}: give an example input; the channels are found by running it.")
    names = places(model, where, what)
    shapes = output_shapes(model, example, names)
    for name in names:
        if len(shapes.get(name, ())) != 4:
            raise UsageError(f"{what}: {name!r} gives {shapes.get(name, 'nothing')}, not maps (n, c, h, w).")
    edits = [Append(name, constructor, {"channels": shapes[name][1], **options}) for name in names]
    apply(model, *edits)
    return model


def output_shapes(model: nn.Module, example: Any, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each of the modules gives on `example`."""
    from convette.surgery._trace import evaluating

    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, result: Any) -> None:
        if isinstance(result, Tensor):
            shapes[name] = tuple(result.shape)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, result, name=name: note(name, result))
        for name in names
    ]
    with hooked(handles), evaluating(model):
        call(model, example)
    return shapes
