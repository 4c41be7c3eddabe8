"""More that becomes one layer exactly: convolutions in a row or side by side, scales, blocks that know how to fuse."""

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convette.errors import FileFormatError, StructureError, did_you_mean
from convette.surgery._edits import Added, Change, ParameterChange, find_module
from convette.surgery._fold import Fold, _folded, _is_batch_norm, affine_of
from convette.surgery._placing import like_its_place, place

METHODS = ("reparameterize", "switch_to_deploy", "fuse")
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Nothing(nn.Module):
    """The number zero in place of a branch whose work another one does; adding it changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a zero of the type of `x`."""
        return x.new_zeros(())


def is_plain_layer(module: nn.Module) -> bool:
    """Tell whether `module` is a convolution or linear layer that runs as PyTorch's own does."""
    return isinstance(module, _PLAIN) and any(type(module).forward is kind.forward for kind in _PLAIN)


def _layer(model: nn.Module, name: str) -> Any:
    layer = find_module(model, name)
    if not is_plain_layer(layer):
        raise StructureError(f"cannot fold {name!r}: {type(layer).__name__} is no plain convolution or linear layer.")
    return layer


def _set(layer: Any, name: str, change: Change, weight: Tensor, bias: Tensor | None, **sizes: Any) -> None:
    """Give `layer` new weights and sizes; note how to go back and what that does to parameters."""
    beside = layer.weight
    for leaf, value in (("weight", weight), ("bias", bias)):
        old = layer._parameters[leaf]
        new = None if value is None else nn.Parameter(value.to(layer.weight), layer.weight.requires_grad)
        layer._parameters[leaf] = new
        change.undo.append(lambda leaf=leaf, old=old: layer._parameters.__setitem__(leaf, old))
        label = f"{name}.{leaf}"
        if old is not None and new is not None and old.shape == new.shape:
            change.parameters[label] = ParameterChange(old, new, {})
            continue
        if old is not None:
            change.parameters[label] = ParameterChange(old, None, {})
        if new is not None:
            change.added[label] = Added(new, beside)
    for key, value in sizes.items():
        old = getattr(layer, key)
        setattr(layer, key, value)
        change.undo.append(lambda key=key, old=old: setattr(layer, key, old))


def _double(tensor: Tensor | None, size: int, like: Tensor) -> Tensor:
    if tensor is None:
        return torch.zeros(size, dtype=torch.float64, device=like.device)
    return tensor.detach().double()


def _text(value: dict[str, Any], kind: str, *names: str) -> list[str]:
    found = [value.get(name) for name in names]
    if not all(isinstance(item, str) and item for item in found):
        raise FileFormatError(f"a '{kind}' edit must name modules: {' and '.join(names)}.")
    return found  # type: ignore[return-value]


class _Folding(abc.ABC):
    """What these edits have in common: all or nothing."""

    def apply(self, model: nn.Module) -> Change:
        """Carry out the fold; raises `StructureError`, with the model unchanged, where the layers do not fit."""
        change = Change()
        with change.all_or_nothing():
            self._apply(model, change)
        return change

    @abc.abstractmethod
    def _apply(self, model: nn.Module, change: Change) -> None:
        """Carry out the fold, noting in `change` how to go back."""


@dataclass(frozen=True)
class FoldConvs(_Folding):
    """Make one of two convolutions or linear layers that follow each other without anything between.

    The one of kernel 1 disappears into the other. ``W = W2·W1, b = b2 + W2·b1``. A first layer of kernel 1 goes into
    one that pads with zeros only where it has no bias: the padding would have to be that bias.
    """

    first: str
    second: str
    kind: ClassVar[str] = "fold_convs"

    def _apply(self, model: nn.Module, change: Change) -> None:
        first, second = _layer(model, self.first), _layer(model, self.second)
        reason = cannot_join(first, second)
        if reason:
            raise StructureError(f"cannot fold {self.first!r} and {self.second!r} into one: {reason}.")
        one, two = first.weight.detach().double(), second.weight.detach().double()
        inner = _double(first.bias, one.shape[0], one)
        start = _double(second.bias, two.shape[0], two)
        # By the second's groups, each of which lies within one of the first's.
        parts = getattr(second, "groups", 1)
        reach = (two.flatten(2).sum(2) if two.ndim > 2 else two).unflatten(0, (parts, -1))
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = start + torch.einsum("gom,gm->go", reach, inner.unflatten(0, (parts, -1))).flatten()
        if _pointwise(second):
            weight = torch.einsum("gom,gm...->go...", reach, one.unflatten(0, (parts, -1))).flatten(0, 1)
            sizes: dict[str, Any] = {"out_features": two.shape[0]}
            if isinstance(first, _ConvNd):
                stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
                sizes = {"out_channels": two.shape[0], "stride": stride}
            _set(first, self.first, change, weight, bias, **sizes)
            gone = self.second
        else:
            weight = torch.einsum("om...,mi->oi...", two, one.flatten(1))
            _set(second, self.second, change, weight, bias, in_channels=one.shape[1])
            gone = self.first
        place(model, gone, nn.Identity(), change)

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "first": self.first, "second": self.second}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "FoldConvs":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        return FoldConvs(*_text(value, "fold_convs", "first", "second"))


def _pointwise(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return all(size == 1 for size in layer.kernel_size) and not any_padding(layer)


def any_padding(layer: Any) -> bool:
    """Tell whether a convolution pads."""
    return layer.padding not in ("valid",) if isinstance(layer.padding, str) else any(layer.padding)


def cannot_join(first: Any, second: Any) -> str:
    """Say why two layers cannot become one ("" where they can)."""
    if isinstance(first, nn.Linear) != isinstance(second, nn.Linear) or first.weight.ndim != second.weight.ndim:
        return "they are of different kinds"
    if first.weight.shape[0] != second.weight.shape[1] * getattr(second, "groups", 1):
        return f"{first.weight.shape[0]} channels meet {second.weight.shape[1] * getattr(second, 'groups', 1)}"
    groups, inner = getattr(first, "groups", 1), getattr(second, "groups", 1)
    if _pointwise(second) and inner % groups == 0:
        return ""
    if groups != 1 or inner != 1:
        return "one has groups"
    if not _pointwise(first) or any(step != 1 for step in first.stride):
        return "neither has kernel size 1 and stride 1"
    if any_padding(second) and second.padding_mode == "zeros" and first.bias is not None and bool(first.bias.any()):
        return "the second pads with zeros where the bias of the first would be"
    return ""


@dataclass(frozen=True)
class FoldScale(_Folding):
    """Multiply the one scale a channel (or the one for all) that module `scale` holds into the `layer` before it."""

    layer: str
    scale: str
    kind: ClassVar[str] = "fold_scale"

    def _apply(self, model: nn.Module, change: Change) -> None:
        layer, scale = _layer(model, self.layer), find_module(model, self.scale)
        held = list(scale.parameters())
        width = layer.weight.shape[0]
        if len(held) != 1 or held[0].numel() not in (1, width):
            raise StructureError(f"cannot fold {self.scale!r}: it holds no single scale of 1 or {width} numbers.")
        vector = held[0].detach().double().flatten().expand(width)
        weight, bias = _folded(layer, vector, torch.zeros_like(vector), Fold(self.layer, self.scale))
        _set(layer, self.layer, change, weight, None if layer.bias is None else bias)
        place(model, self.scale, nn.Identity(), change)

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "layer": self.layer, "scale": self.scale}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "FoldScale":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        return FoldScale(*_text(value, "fold_scale", "layer", "scale"))


@dataclass(frozen=True)
class Merge(_Folding):
    """Add the `branches`, which read what convolution `into` reads and are added to what it gives, into its kernel.

    A branch is a convolution of the same stride and groups whose kernel (spread out by its dilation) fits into that
    of `into` at its padding, or a batch norm (the identity branch of RepVGG, arXiv 2101.03697). It becomes `Nothing`.
    """

    into: str
    branches: tuple[str, ...]
    kind: ClassVar[str] = "merge"

    def _apply(self, model: nn.Module, change: Change) -> None:
        layer = _layer(model, self.into)
        weight = layer.weight.detach().double().clone()
        bias, biased = _double(layer.bias, weight.shape[0], weight), layer.bias is not None
        for name in self.branches:
            added = as_kernel(layer, find_module(model, name))
            if isinstance(added, str) or name == self.into:
                raise StructureError(f"cannot merge {name!r} into {self.into!r}: {added}.")
            weight += added[0]
            if added[1] is not None:
                bias, biased = bias + added[1], True
        _set(layer, self.into, change, weight, bias if biased else None)
        for name in self.branches:
            place(model, name, Nothing(), change)

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "into": self.into, "branches": list(self.branches)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Merge":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        (into,) = _text(value, "merge", "into")
        branches = value.get("branches")
        if not isinstance(branches, list) or not branches or not all(isinstance(item, str) for item in branches):
            raise FileFormatError("a 'merge' edit must list the branches it merges.")
        return Merge(into, tuple(branches))


def as_kernel(layer: Any, branch: Any) -> tuple[Tensor, Tensor | None] | str:
    """Return `branch` as a kernel of the shape of `layer`'s and a bias (float64), or why it is none."""
    if not isinstance(layer, _ConvNd) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return "only convolutions with zero padding in numbers take branches in"
    dims = len(layer.kernel_size)
    reach = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    if _is_batch_norm(branch):
        if layer.in_channels != layer.out_channels or branch.num_features != layer.in_channels:
            return "the norm has another number of channels"
        if any(step != 1 for step in layer.stride) or [2 * p for p in layer.padding] != [r - 1 for r in reach]:
            return "the convolution changes the size of the map"
        scale, shift = affine_of(branch)
        part = layer.in_channels // layer.groups
        kernel = scale.new_zeros(layer.weight.shape[:2])
        rows = torch.arange(len(scale))
        kernel[rows, rows % part] = scale
        return _embedded(kernel.view(*kernel.shape, *[1] * dims), [1] * dims, list(layer.padding), layer, reach, shift)
    if not is_plain_layer(branch) or not isinstance(branch, _ConvNd) or isinstance(branch.padding, str):
        return f"{type(branch).__name__} is no plain convolution"
    if (branch.stride, branch.groups, branch.padding_mode) != (layer.stride, layer.groups, "zeros"):
        return "stride, groups or padding differ"
    if branch.weight.shape[:2] != layer.weight.shape[:2]:
        return "the numbers of channels differ"
    shift = None if branch.bias is None else branch.bias.detach().double()
    places = [a - b for a, b in zip(layer.padding, branch.padding, strict=True)]
    return _embedded(branch.weight.detach().double(), list(branch.dilation), places, layer, reach, shift)


def _embedded(
    kernel: Tensor, dilation: list[int], places: list[int], layer: Any, reach: list[int], shift: Tensor | None
) -> tuple[Tensor, Tensor | None] | str:
    result = kernel.new_zeros(layer.weight.shape)
    index: list[Any] = [slice(None), slice(None)]
    for size, step, at, own, whole in zip(kernel.shape[2:], dilation, places, layer.dilation, reach, strict=True):
        taps = [at + step * k for k in range(size)]
        if taps[0] < 0 or taps[-1] >= whole or any(tap % own for tap in taps):
            return "its kernel does not lie within the other's"
        # Both ends must be as far from the border, or the maps would differ in size.
        if at + (taps[-1] - taps[0]) + at != whole - 1:
            return "its padding does not centre it"
        index.append(torch.tensor([tap // own for tap in taps], device=kernel.device))
    grids = torch.meshgrid(*index[2:], indexing="ij")
    result[(slice(None), slice(None), *grids)] = kernel
    return result, shift


@dataclass(frozen=True)
class Reparameterize(_Folding):
    """Let a block that knows how (timm's RepVGG, MobileOne, FastViT, RepViT ...) become its inference form."""

    module: str
    method: str
    kind: ClassVar[str] = "reparameterize"

    def _apply(self, model: nn.Module, change: Change) -> None:
        fused = fused_form(find_module(model, self.module), self.method)
        place(model, self.module, fused, change)

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "module": self.module, "method": self.method}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Reparameterize":
        """Read the edit; raises `FileFormatError` where it is malformed or asks for another method."""
        module, method = _text(value, "reparameterize", "module", "method")
        if method not in METHODS:
            raise FileFormatError(f"a 'reparameterize' edit: no method {method!r:.40}.{did_you_mean(method, METHODS)}")
        return Reparameterize(module, method)


def fused_form(module: nn.Module, method: str) -> nn.Module:
    """Return a fused copy of `module`; raises `StructureError` where it cannot fuse."""
    call: Callable[[], Any] | None = getattr(twin := copy.deepcopy(module), method, None)
    if not callable(call):
        raise StructureError(f"{type(module).__name__} cannot {method}.")
    # Blocks make the fused layer in the default type: it must not be a coarser one than theirs.
    default, own = torch.get_default_dtype(), next((t.dtype for t in module.parameters()), None)
    try:
        torch.set_default_dtype(torch.float64 if own == torch.float64 else default)
        with torch.no_grad():
            given = call()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{type(module).__name__} does not {method}: {reason}") from error
    finally:
        torch.set_default_dtype(default)
    fused = given if isinstance(given, nn.Module) else twin
    return like_its_place(fused, module, module)
