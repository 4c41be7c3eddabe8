"""Which layer to explain: the last spatial stage, found by running the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convette._typing import Images
from convette.errors import UsageError
from convette.explain._run import find_module, hooked, undisturbed

_PASSIVE = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)


@dataclass(frozen=True)
class LayerChoice:
    """A layer by name, why it was chosen, and the size (channels, rows, columns) of its map (None: not looked at)."""

    name: str
    reason: str
    shape: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class _Map:
    """One value that one or several modules gave out, the latest last."""

    value: Tensor
    names: list[str]
    pooled: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, rows, columns = self.value.shape[1:]
        if channels == rows != columns:  # channels last
            channels, rows, columns = columns, channels, rows
        return int(channels), int(rows), int(columns)

    @property
    def name(self) -> str:
        """The outermost module that gives this value out; of several, the latest (after an in-place activation)."""
        depth = min(name.count(".") for name in self.names)
        return [name for name in self.names if name.count(".") == depth][-1]


def target_layer(model: nn.Module, example: Images, *, min_side: int = 4) -> LayerChoice:
    """Choose the last spatial stage of `model`, from one run on the first image of `example`.

    That is the last map of the lowest resolution that still has `min_side` rows and columns (or, where there is none,
    the last map with more than one position), as given out by the outermost module. Pools are passed over, for they
    hold no more than what comes before them, and maps of class scores, for they are no features.

    Args:
        model: any network that gives out maps (n, c, h, w) somewhere inside; left as it was.
        example: images as the network takes them.
        min_side: fewest rows and columns; coarser maps show little.

    Raises:
        UsageError: no map with more than one position.
    """
    maps, output = _observe(model, example[:1])
    classes = output.shape[1] if isinstance(output, Tensor) and output.ndim >= 2 else None
    spatial = [m for m in maps if m.shape[1] * m.shape[2] > 1 and m.value is not output]
    usable = [m for m in spatial if not m.pooled] or spatial
    features = [m for m in usable if m.shape[0] != classes] or usable
    if not features:
        size = "x".join(str(side) for side in example.shape[-2:])
        raise UsageError(f"no layer of this network has a map with more than one position for images of {size} px.")
    fine = [m for m in features if min(m.shape[1:]) >= min_side]
    candidates = fine or features
    area = min(m.shape[1] * m.shape[2] for m in candidates)
    stage = [m for m in candidates if m.shape[1] * m.shape[2] == area]
    depth = min(m.name.count(".") for m in stage)
    chosen = [m for m in stage if m.name.count(".") == depth][-1]
    return LayerChoice(chosen.name, _reason(chosen, features, len(fine) < len(features), min_side), chosen.shape)


def _reason(chosen: _Map, features: Sequence[_Map], coarser: bool, min_side: int) -> str:
    channels, rows, columns = chosen.shape
    text = f"{chosen.name}: the last stage with a spatial map ({rows}x{columns}, {channels} channels)"
    later = [m for m in features if m.shape[1] * m.shape[2] < rows * columns]
    if coarser and later:
        _, r, c = later[-1].shape
        text += f" of at least {min_side}x{min_side}; later ones are {r}x{c}"
    return text + "."


def _observe(model: nn.Module, image: Tensor) -> tuple[list[_Map], Any]:
    """Run `model` on one image; return the four-dimensional values its modules gave out, in order, and its output."""
    seen: dict[int, _Map] = {}  # by identity; the values are kept alive, so identities stay apart

    def watch(name: str, leaf: bool, module: nn.Module) -> Any:
        pool = leaf and "pool" in type(module).__name__.lower()

        def hook(_module: nn.Module, _inputs: Any, value: Any) -> None:
            if isinstance(value, Tensor) and value.ndim == 4 and not isinstance(module, _PASSIVE):
                entry = seen.pop(id(value), None) or _Map(value, [], False)
                entry.names.append(name)
                entry.pooled |= pool
                seen[id(value)] = entry  # at the end: the latest module to give it out counts

        return module.register_forward_hook(hook)

    handles: list[Any] = []
    with hooked(handles), torch.no_grad(), undisturbed(model, image.device):
        for name, module in model.named_modules():
            if name:
                handles.append(watch(name, not any(module.children()), module))
        output = model(image)
    return list(seen.values()), output


def resolve_layer(model: nn.Module, layer: str | nn.Module | None, images: Tensor) -> LayerChoice:
    """Return the layer the user named, or the one `target_layer` finds."""
    from convette.explain._run import name_of

    if layer is None:
        return target_layer(model, images)
    name = name_of(model, layer)
    find_module(model, name)
    return LayerChoice(name, f"{name}: named by the user.")
