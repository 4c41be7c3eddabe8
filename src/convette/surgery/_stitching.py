"""From two networks and a cut in each to a stitched one: what runs where, the cut proved, the layer fitted."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import StructureError
from convette.layers._watching import call, hooked
from convette.surgery._apply import relative_error
from convette.surgery._edits import find_module
from convette.surgery._log import Origin, set_origin, structure_log
from convette.surgery._stitch import CONSTRUCTOR, Side, Stitch, Stitched, fed
from convette.surgery._trace import evaluating, outputs_of


def stitch(
    front: nn.Module, front_at: str, back: nn.Module, back_at: str, example: Tensor, *, tolerance: float = 1e-5
) -> Stitched:
    """Return a new network: `front` up to its module `front_at`, a linear layer, `back` after its module `back_at`.

    The layer (a 1x1 convolution for maps, a linear one for tokens or vectors; averaging or repeating where the maps'
    sizes differ by a whole factor) is the least-squares fit, on the batch `example`, of what `back_at` gives in `back`
    by what `front_at` gives in `front`: ``min |W·a + b - target|²``. Use many images: at least a few values for each
    channel. The two networks are left as they are; copies become parts. Where both have an origin the result has one.

    Raises `StructureError` where a module does not give one tensor, the sizes do not agree, or `back` cannot be cut
    there (something passes around the cut; checked by feeding it its own activations).
    Cost: four runs of the networks, and the fit (values x channels²).
    """
    front_value, _, unused = _watched(front, front_at, example)
    back_value, over, _ = _watched(back, back_at, example)
    with evaluating(back):
        whole = [item.clone() for item in outputs_of(call(back, example), [])]
    recipe = _recipe(
        Side(_origin(front), tuple(structure_log(front).edits), front_at, tuple(unused)),
        Side(_origin(back), tuple(structure_log(back).edits), back_at, tuple(over)),
        front_value,
        back_value,
    )
    made = recipe.assemble(copy.deepcopy(front), copy.deepcopy(back))
    made.stitch.to(back_value)
    if not _runs(made, example):
        recipe = dataclasses.replace(recipe, stop=True)
        made.catcher.stop = True
    _check_cut(made, back_value, whole, tolerance)
    _fit(made.stitch, front_value, back_value)
    if structure_log(front).origin is not None and structure_log(back).origin is not None:
        set_origin(made, Origin(CONSTRUCTOR, recipe.to_json()))
    return made.eval()


def _runs(made: Stitched, example: Tensor) -> bool:
    try:
        with evaluating(made):
            made.front(example)
        return True
    except Exception:  # What the front does after its cut may not fit what is left of it.
        return False
    finally:
        made.catcher.value = None


def _origin(model: nn.Module) -> Origin:
    return structure_log(model).origin or Origin("unknown")


def _watched(model: nn.Module, at: str, example: Any) -> tuple[Tensor, list[str], list[str]]:
    """Return what module `at` gives, the modules that only run before it, and those that only run after it."""
    cut = find_module(model, at)
    names = {id(module): name for name, module in model.named_modules()}
    before: set[str] = set()
    after: set[str] = set()
    given: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        (after if given else before).add(names[id(module)])

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        given.append(output)

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles.append(cut.register_forward_hook(leave))
    with hooked(handles), evaluating(model):
        call(model, example)
    if len(given) != 1 or not isinstance(given[0], Tensor):
        what = f"runs {len(given)} times" if len(given) != 1 else f"gives a {type(given[0]).__name__}"
        raise StructureError(f"a network can be cut at a module that runs once and gives one tensor; {at!r} {what}.")
    inside = {name for name in before if name == at or name.startswith(f"{at}.")}
    return (
        given[0].detach().clone(),
        _outermost(model, before - after - inside, at),
        _outermost_unused(model, before, at),
    )


def _around(at: str, name: str) -> bool:
    return not name or at == name or at.startswith(f"{name}.")


def _outermost(model: nn.Module, names: set[str], at: str) -> list[str]:
    """Return the outermost of `names`, leaving out what holds the cut and what holds modules that still run."""
    found: list[str] = []
    for name, _ in model.named_modules():
        if name in names and not _around(at, name) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _outermost_unused(model: nn.Module, before: set[str], at: str) -> list[str]:
    """Return the outermost modules in which nothing runs before the cut does."""
    needed = {prefix for name in before for prefix in _prefixes(name)} | set(_prefixes(at))
    found: list[str] = []
    for name, _ in model.named_modules():
        inside_needed = at and name.startswith(f"{at}.")
        if name not in needed and not inside_needed and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[: k + 1]) for k in range(len(parts)))]


def _recipe(front: Side, back: Side, given: Tensor, target: Tensor) -> Stitch:
    shapes = f"{tuple(given.shape)} ({front.at!r}) and {tuple(target.shape)} ({back.at!r})"
    if given.ndim != target.ndim or given.ndim not in (2, 3, 4):
        raise StructureError(
            f"no layer joins {tuple(given.shape)} ({front.at!r}) and {tuple(target.shape)} ({back.at!r})."
        )
    if given.ndim < 4:
        if given.shape[:-1] != target.shape[:-1]:
            raise StructureError(f"no layer joins {shapes}: all but the last size must agree.")
        return Stitch(front, back, given.shape[-1], target.shape[-1], "linear")
    (h, w), (height, width) = given.shape[2:], target.shape[2:]
    pool = h // height if h % height == 0 and w % width == 0 and h // height == w // width else 0
    upsample = height // h if height % h == 0 and width % w == 0 and height // h == width // w else 0
    if not pool and not upsample:
        raise StructureError(
            f"no whole factor between maps of {h}x{w} ({front.at!r}) and {height}x{width} ({back.at!r})."
        )
    return Stitch(front, back, given.shape[1], target.shape[1], "conv", pool or 1, upsample or 1)


def _check_cut(made: Stitched, value: Tensor, whole: list[Tensor], tolerance: float) -> None:
    try:
        with evaluating(made):
            again = outputs_of(fed(made.back, made.feed_name, value), [])
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"the back does not run from {made.feed_name!r} on: {reason}") from error
    fits = len(again) == len(whole) and all(a.shape == b.shape for a, b in zip(whole, again, strict=True))
    if not fits or any(not relative_error(a, b) <= tolerance for a, b in zip(whole, again, strict=True)):
        raise StructureError(
            f"the back cannot be cut at {made.feed_name!r}: fed its own activations it gives something else (an input "
            "or an earlier layer passes around that module). Cut where everything passes through, such as a stage."
        )


def _fit(layer: nn.Module, given: Tensor, target: Tensor) -> None:
    """Set the weights of a connection to the least-squares fit of `target` by `given`, in double precision."""
    linear: Any = layer
    if isinstance(layer, nn.Sequential):
        steps = list(layer)
        linear = next(step for step in steps if isinstance(step, nn.Conv2d))
        if isinstance(steps[0], nn.AvgPool2d):
            given = steps[0](given)
        if isinstance(steps[-1], nn.Upsample):
            target = nn.functional.avg_pool2d(target, int(steps[-1].scale_factor))  # type: ignore[arg-type]
        given, target = (item.movedim(1, -1) for item in (given, target))
    a = given.reshape(-1, given.shape[-1]).double()
    b = target.reshape(-1, target.shape[-1]).double()
    means = a.mean(0), b.mean(0)
    left = (a - means[0]).cpu()
    weight = torch.linalg.lstsq(left, (b - means[1]).cpu(), driver="gelsd").solution.T.to(a.device)
    with torch.no_grad():
        linear.weight.copy_(weight.view(linear.weight.shape))
        linear.bias.copy_(means[1] - weight @ means[0])
