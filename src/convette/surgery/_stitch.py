"""Stitching: the front of one network, a linear layer, the back of another (arXiv 2106.07682, 2302.06586)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convette.errors import FileFormatError, StructureError
from convette.surgery._apply import replay
from convette.surgery._edits import Edit, find_module
from convette.surgery._edits_json import edit_from_json
from convette.surgery._log import Origin, set_origin

CONSTRUCTOR = "convette:stitch"
_DEEPEST = 8
_MOST_CHANNELS, _MOST_SCALE, _MOST_NAMES = 1 << 20, 64, 100_000


class _Reached(Exception):
    """Carries out of the front what its last module gave."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Catcher:
    """A hook that keeps what a module gives and, with `stop`, ends the run there."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.value: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stop:
            raise _Reached(output)
        self.value = output


class Skip(nn.Module):
    """In place of a module whose result is not used: gives back what it reads."""

    def forward(self, x: Any = None, *others: Any, **named: Any) -> Any:
        """Return `x`."""
        return x


class Feed(nn.Module):
    """In place of the module at which a network is entered: gives what it was handed, whatever it reads."""

    def __init__(self) -> None:
        """Hold nothing."""
        super().__init__()
        self.held: Any = None

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what is held."""
        return self.held


class Stitched(nn.Module):
    """``back(stitch(front(x)))``: `front` runs up to its module `front_at`, `back` goes on after its `back_at`.

    Modules of the two that no longer matter are gone (`Skip`); both keep their own forward. What the front's does
    between them after its cut (a flatten, a mean) still runs, to no effect, unless `stop` ends it by an exception,
    which exporters do not follow. Made by `stitch`.
    """

    def __init__(
        self, front: nn.Module, front_at: str, stitch: nn.Module, back: nn.Module, back_at: str, stop: bool = False
    ) -> None:
        """Take `front` and `back` over as they are but for the two modules named."""
        super().__init__()
        self.front, self.stitch, self.back = front, stitch, back
        self.feed_name = back_at
        self.catcher = _Catcher(stop)
        find_module(front, front_at).register_forward_hook(self.catcher)
        owner, _, leaf = back_at.rpartition(".")
        find_module(back, owner)._modules[leaf] = Feed()

    def forward(self, x: Tensor) -> Any:
        """Return what the back makes of the front's stitched activations on `x`."""
        try:
            self.front(x)
            value = self.catcher.value
        except _Reached as reached:
            value = reached.value
        finally:
            self.catcher.value = None
        return fed(self.back, self.feed_name, self.stitch(value))


def fed(back: nn.Module, name: str, value: Tensor) -> Any:
    """Run `back` from its module `name` (a `Feed`) on with `value`."""
    feed = back.get_submodule(name)
    assert isinstance(feed, Feed)
    feed.held = value
    try:
        return back(value)
    finally:
        feed.held = None


@dataclass(frozen=True)
class Side:
    """One of the two networks: origin and edits, the module where it is cut, and the modules that are gone."""

    origin: Origin
    edits: tuple[Edit, ...]
    at: str
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the side as a JSON object."""
        return {
            "origin": self.origin.to_json(),
            "edits": [edit.to_json() for edit in self.edits],
            "at": self.at,
            "skipped": list(self.skipped),
        }

    @staticmethod
    def from_json(value: Any) -> "Side":
        """Read a side; raises `FileFormatError` where it is malformed."""
        if not isinstance(value, dict):
            raise FileFormatError("a stitched network must say what its front and its back are.")
        at, skipped, edits = value.get("at"), value.get("skipped", []), value.get("edits", [])
        if not isinstance(at, str) or not at:
            raise FileFormatError("a stitched network must name the module at which each side is cut.")
        if not isinstance(skipped, list) or len(skipped) > _MOST_NAMES or not all(_is_name(item) for item in skipped):
            raise FileFormatError("a stitched network must list the modules it skips by name.")
        if not isinstance(edits, list):
            raise FileFormatError("the edits of a stitched network's side must be a list.")
        return Side(Origin.from_json(value.get("origin")), tuple(map(edit_from_json, edits)), at, tuple(skipped))


def _is_name(item: Any) -> bool:
    return isinstance(item, str) and 0 < len(item) <= 500


@dataclass(frozen=True)
class Stitch:
    """How a stitched network is made, as data: its two sides and the layer between.

    `layer` is "conv" (1x1, for maps) or "linear" (for tokens and vectors); before it maps are averaged over
    `pool` x `pool` places or repeated `upsample` times in each direction, so that the sizes agree. `stop`: the front
    must be left at its cut, see `Stitched`.
    """

    front: Side
    back: Side
    in_channels: int
    out_channels: int
    layer: str = "conv"
    pool: int = 1
    upsample: int = 1
    stop: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a JSON object."""
        sizes = {
            key: getattr(self, key) for key in ("in_channels", "out_channels", "layer", "pool", "upsample", "stop")
        }
        return {"front": self.front.to_json(), "back": self.back.to_json(), **sizes}

    @staticmethod
    def from_json(value: Any) -> "Stitch":
        """Read a recipe; raises `FileFormatError` where it is malformed or nested too deep."""
        if not isinstance(value, dict):
            raise FileFormatError("a stitched network's arguments must be an object.")
        if _depth(value) > _DEEPEST:
            raise FileFormatError(f"networks stitched of stitched ones more than {_DEEPEST} deep are not built.")
        sizes: dict[str, Any] = {"layer": value.get("layer", "conv"), "stop": value.get("stop", False)}
        if not isinstance(sizes["stop"], bool):
            raise FileFormatError("stop of a stitched network must be true or false.")
        if sizes["layer"] not in ("conv", "linear"):
            raise FileFormatError(f"the layer of a stitched network is 'conv' or 'linear', not {sizes['layer']!r:.40}.")
        limits = {"in_channels": _MOST_CHANNELS, "out_channels": _MOST_CHANNELS}
        for name, most in {**limits, "pool": _MOST_SCALE, "upsample": _MOST_SCALE}.items():
            size = value.get(name, 1)
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
                raise FileFormatError(f"{name} of a stitched network must be a whole number from 1 to {most}.")
            sizes[name] = size
        if sizes["in_channels"] * sizes["out_channels"] > 1 << 28:
            raise FileFormatError("the layer of a stitched network would be too large.")
        return Stitch(Side.from_json(value.get("front")), Side.from_json(value.get("back")), **sizes)

    def assemble(self, front: nn.Module, back: nn.Module) -> Stitched:
        """Return the stitched network of two built ones, which become parts of it; the layer's weights are drawn.

        Raises `StructureError` where a module that is named is not there.
        """
        for model, side in ((front, self.front), (back, self.back)):
            find_module(model, side.at)
            skip(model, side.skipped, side.at)
            forget_log(model)
        return Stitched(front, self.front.at, self.connection(), back, self.back.at, self.stop)

    def connection(self) -> nn.Module:
        """Return the layer between, after what makes the sizes agree."""
        if self.layer == "linear":
            return nn.Linear(self.in_channels, self.out_channels)
        layers: list[nn.Module] = [nn.Conv2d(self.in_channels, self.out_channels, 1)]
        if self.pool > 1:
            layers.insert(0, nn.AvgPool2d(self.pool))
        if self.upsample > 1:
            layers.append(nn.Upsample(scale_factor=self.upsample))
        return nn.Sequential(*layers)


def _depth(value: Any) -> int:
    """Return how deep stitched networks are nested in a recipe, at most one more than allowed."""
    level, sides = 1, [value]
    while level <= _DEEPEST:
        inner = []
        for item in sides:
            for key in ("front", "back"):
                side = item.get(key) if isinstance(item, dict) else None
                origin = side.get("origin") if isinstance(side, dict) else None
                if isinstance(origin, dict) and origin.get("constructor") == CONSTRUCTOR:
                    inner.append(origin.get("arguments"))
        if not inner:
            return level
        sides = inner[:64]
        level += 1
    return level


def skip(model: nn.Module, names: Iterable[str], at: str) -> None:
    """Put `Skip` in place of modules of `model`; raises `StructureError` for one that the cut `at` lies in."""
    for name in names:
        if at == name or at.startswith(f"{name}."):
            raise StructureError(f"module {name!r} cannot be skipped: the cut at {at!r} lies in it.")
        owner, _, leaf = name.rpartition(".")
        find_module(model, name)
        find_module(model, owner)._modules[leaf] = Skip()


def forget_log(model: nn.Module) -> None:
    """Take the log and card off a network that becomes part of another."""
    for key in ("_convette_structure_log", "_convette_model_card"):
        model.__dict__.pop(key, None)


def build_stitched(arguments: dict[str, Any], build: Callable[[Origin], nn.Module]) -> nn.Module:
    """Return the stitched network that the arguments of its origin describe; `build` makes the two sides.

    Raises `FileFormatError` where they are malformed, or the edits or cuts do not fit.
    """
    recipe = Stitch.from_json(arguments)
    try:
        sides = [replay(build(side.origin), side.edits) for side in (recipe.front, recipe.back)]
        return set_origin(recipe.assemble(*sides), Origin(CONSTRUCTOR, arguments))
    except StructureError as error:
        raise FileFormatError(f"origin {CONSTRUCTOR!r}: {error}") from error
