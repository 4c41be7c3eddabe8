"""Second moments of what convolutions and linear layers read, gathered from calibration data, as matrices."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import StructureError

LARGEST = 2304  # columns of the widest matrix that is gathered patch by patch


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer is one matrix a part: ``weight.reshape(parts, rows, columns)``.

    `channels[c]` is the input channel, within its part, that column c belongs to. "patches": a column an input channel
    and tap, as the convolution reads them, padding included. "channels": the taps are rows, a column an input channel:
    smaller, and blind to how neighbouring positions go together.
    """

    kind: str  # "patches" or "channels"
    parts: int
    channels: Tensor

    @property
    def columns(self) -> int:
        """The width of the matrix."""
        return len(self.channels)


def layout_of(module: Any, weight: Tensor, spatial: str) -> Layout:
    """Return the layout of a linear layer, of an attention's projection, or of a convolution.

    `spatial`: "patches", "channels" or "auto" (patches where there are at most `LARGEST` columns).
    """
    if weight.ndim == 2:
        return Layout("channels", 1, torch.arange(weight.shape[1]))
    taps = weight[0, 0].numel()
    patches = weight.ndim == 4 and getattr(module, "padding_mode", "zeros") == "zeros"
    patches = patches and not isinstance(getattr(module, "padding", 0), str)
    if spatial == "channels" or not patches or (spatial == "auto" and weight.shape[1] * taps > LARGEST):
        return Layout("channels", module.groups, torch.arange(weight.shape[1]))
    return Layout("patches", module.groups, torch.arange(weight.shape[1]).repeat_interleave(taps))


def as_matrix(weight: Tensor, layout: Layout) -> Tensor:
    """Return the weight as (parts, rows, columns) in float64."""
    weight = weight.detach().double()
    if layout.kind == "channels" and weight.ndim > 2:
        weight = weight.movedim(1, -1)
        return weight.reshape(layout.parts, -1, weight.shape[-1])
    return weight.reshape(layout.parts, -1, layout.columns)


def as_weight(matrix: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """Undo `as_matrix`."""
    if layout.kind == "channels" and like.ndim > 2:
        return matrix.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1).to(like)
    return matrix.reshape(like.shape).to(like)


def as_rows(module: Any, value: Tensor, layout: Layout, rows: int, key: str) -> Tensor:
    """Return at most `rows` of what the module reads in `value` as (parts, rows, columns), float64.

    Which positions are taken depends on `key` and the shape alone, so that two networks can be compared.
    """
    if layout.kind == "patches":
        return _patches(module, value, layout, rows, key)
    moved = value.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else value
    found = moved.reshape(-1, layout.parts, layout.columns)
    if (chosen := _chosen(len(found), rows, key)) is not None:
        found = found[chosen.to(found.device)]
    return found.transpose(0, 1).cpu().double()


def _patches(module: Any, value: Tensor, layout: Layout, rows: int, key: str) -> Tensor:
    """Return the chosen patches of a convolution's input; those that are not chosen are never copied."""
    vertical, horizontal = module.padding
    padded = functional.pad(value, (horizontal, horizontal, vertical, vertical))
    size, strides = padded.shape[2:], padded.stride()
    places = [
        (length - dilation * (kernel - 1) - 1) // step + 1
        for length, dilation, kernel, step in zip(size, module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    view = padded.as_strided(
        (len(value), *places, value.shape[1], *module.kernel_size),
        (
            strides[0],
            strides[2] * module.stride[0],
            strides[3] * module.stride[1],
            strides[1],
            strides[2] * module.dilation[0],
            strides[3] * module.dilation[1],
        ),
    )
    chosen = _chosen(len(value) * places[0] * places[1], rows, key)
    if chosen is None:
        found = view.flatten(0, 2)
    else:
        chosen = chosen.to(value.device)
        position = chosen % (places[0] * places[1])
        found = view[chosen // (places[0] * places[1]), position // places[1], position % places[1]]
    return found.reshape(len(found), layout.parts, layout.columns).transpose(0, 1).cpu().double()


def _chosen(count: int, rows: int, key: str) -> Tensor | None:
    if count <= rows:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}:{count}".encode()))
    return torch.randperm(count, generator=generator)[:rows]


@dataclass
class Moments:
    """Sums over rows x of the original network and y of the one at work: ``y y'``, ``x y'``, ``x x'``, and means."""

    own: Tensor
    cross: Tensor
    reference: Tensor
    own_sum: Tensor
    reference_sum: Tensor
    rows: int = 0

    @staticmethod
    def zeros(layout: Layout) -> "Moments":
        """Return moments of nothing."""
        square = torch.zeros(layout.parts, layout.columns, layout.columns, dtype=torch.float64)
        flat = torch.zeros(layout.parts, layout.columns, dtype=torch.float64)
        return Moments(square.clone(), square.clone(), square.clone(), flat.clone(), flat.clone())

    def add(self, own: Tensor, reference: Tensor | None = None, *, where: str) -> None:
        """Take in rows (parts, rows, columns); `reference` None: the network is its own reference.

        Raises `StructureError` for values that are not finite; `where` says who asks and what reads them.
        """
        sums = own.sum(dim=1)
        if not torch.isfinite(sums).all():  # one that is not finite makes its sum so
            raise StructureError(f"{where} reads activations that are not finite; look at weights and calibration.")
        self.rows += own.shape[1]
        self.own += own.transpose(1, 2) @ own
        self.own_sum += sums
        if reference is None:
            self.cross, self.reference, self.reference_sum = self.own, self.own, self.own_sum
            return
        self.cross += reference.transpose(1, 2) @ own
        self.reference += reference.transpose(1, 2) @ reference
        self.reference_sum += reference.sum(dim=1)


@dataclass
class Gathering:
    """A callback that gathers the moments of several layers at once."""

    layouts: Mapping[str, Layout]
    rows: int
    asker: str
    moments: dict[str, Moments] = field(default_factory=dict)
    calls: int = 0

    def note(self, parameter: str, module: nn.Module, value: Tensor) -> None:
        """Take in what `module` reads for the weight called `parameter`."""
        self.calls += 1
        layout = self.layouts[parameter]
        found = as_rows(module, value, layout, self.rows, f"{parameter}:{self.calls}")
        if parameter not in self.moments:
            self.moments[parameter] = Moments.zeros(layout)
        self.moments[parameter].add(found, where=f"{self.asker}: {parameter}")


Note = Callable[[str, nn.Module, Tensor], None]
