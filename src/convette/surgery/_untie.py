"""Un-tying a residual stream: what is added to it and what reads it choose their channels on their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from convette.errors import FileFormatError
from convette.layers import Stays
from convette.surgery._edits import Change, find_module
from convette.surgery._placing import place

_MOST_CHANNELS = 1 << 20


def gather_channels(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return the channels `index` of `x`; a function of its own, so that a trace sees where a stream is read."""
    if has_torch_function((x, index)):
        return handle_torch_function(gather_channels, (x, index), x, index, dim)
    return x.index_select(dim, index)


def scatter_channels(x: Tensor, index: Tensor, width: int, dim: int) -> Tensor:
    """Return `width` channels: those of `x` at the places `index`, zeros elsewhere."""
    if has_torch_function((x, index)):
        return handle_torch_function(scatter_channels, (x, index), x, index, width, dim)
    shape = list(x.shape)
    shape[dim] = width
    return x.new_zeros(shape).index_copy(dim, index, x)


class _Index(nn.Module):
    """Which channels of a stream of `width` are meant: the buffer `index`, all of them at first."""

    index: Tensor

    def __init__(self, width: int, dim: int = 1) -> None:
        super().__init__()
        self.width, self.dim = width, dim
        self.register_buffer("index", torch.arange(width))

    def folded(self) -> nn.Module:
        """Return nothing at all where all channels are meant; raises `Stays` otherwise."""
        if len(self.index) == self.width and bool((self.index == torch.arange(self.width).to(self.index)).all()):
            return nn.Identity()
        raise Stays(f"{type(self).__name__}: {len(self.index)} of the {self.width} channels of a stream are used.")

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.width}, dim={self.dim}"


class Gather(_Index):
    """Reads some channels of a stream: ``y = x[:, index]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels that are read."""
        return gather_channels(x, self.index, self.dim)


class Scatter(_Index):
    """Puts channels to their places in a stream, zeros elsewhere: ``y[:, index] = x``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return all channels of the stream."""
        return scatter_channels(x, self.index, self.width, self.dim)


class _Around(nn.Module):
    """A layer with an index before or after it; what the layer has, it has."""

    layer: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


class Reading(_Around):
    """`layer`, which reads some channels of a stream."""

    def __init__(self, layer: nn.Module, gather: Gather) -> None:
        super().__init__()
        self.gather, self.layer = gather, layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what `layer` makes of the channels it reads."""
        return self.layer(self.gather(x), *args, **kwargs)


class Writing(_Around):
    """`layer`, whose channels go to some places of a stream."""

    def __init__(self, layer: nn.Module, scatter: Scatter) -> None:
        super().__init__()
        self.layer, self.scatter = layer, scatter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `layer` gives, at its places in the stream."""
        return self.scatter(self.layer(*args, **kwargs))


@dataclass(frozen=True)
class Site:
    """Where an index goes: around `module`, which reads or gives `width` channels along dimension `dim`."""

    module: str
    width: int
    dim: int = 1


@dataclass(frozen=True)
class Untie:
    """Put a gather in front of what reads a residual stream (`reads`) and a scatter behind what is added (`writes`).

    The stream itself keeps its width: it holds the sums. What a trace then finds are separate groups: the channels
    each branch gives, and those each reader reads. Nothing is computed differently, bit for bit. Indices that still
    name all channels fold away (`convette.surgery.fold`).
    """

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    kind: ClassVar[str] = "untie"

    def apply(self, model: nn.Module) -> Change:
        """Put the indices in; raises `StructureError`, with the model unchanged, where a module is not there."""
        change = Change()
        made: dict[str, Callable[[nn.Module, Site], nn.Module]] = {"reads": _reading, "writes": _writing}
        try:
            for name, make in made.items():
                for site in getattr(self, name):
                    old = find_module(model, site.module)
                    new = make(old, site).train(old.training)
                    place(model, site.module, _on_device_of(new, old, model), change)
        except BaseException:
            change.revert()
            raise
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, **{name: [list(vars(s).values()) for s in getattr(self, name)] for name in _SIDES}}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Untie":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        sides = []
        for name in _SIDES:
            rows = value.get(name)
            if not isinstance(rows, list):
                raise FileFormatError(f"an 'untie' edit lists what it {name}.")
            sides.append(tuple(_site(row) for row in rows))
        return Untie(*sides)


_SIDES = ("reads", "writes")


def _site(row: Any) -> Site:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or not row[0]:
        raise FileFormatError("an 'untie' edit names a module, a width and a dimension for each place.")
    for number, low, high in ((row[1], 1, _MOST_CHANNELS), (row[2], -1, 4)):
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise FileFormatError(f"an 'untie' edit: {number!r:.40} is not a number from {low} to {high}.")
    return Site(*row)


def _reading(layer: nn.Module, site: Site) -> nn.Module:
    return Reading(layer, Gather(site.width, site.dim))


def _writing(layer: nn.Module, site: Site) -> nn.Module:
    return Writing(layer, Scatter(site.width, site.dim))


def _on_device_of(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Move only the index: whatever the layer is on it stays on."""
    tensors = [*old.parameters(), *old.buffers(), *model.parameters()]
    for part in new.children():
        if isinstance(part, _Index) and tensors:
            part.to(tensors[0].device)
    return new
