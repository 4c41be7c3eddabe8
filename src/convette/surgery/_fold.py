"""Folding: a batch normalisation becomes part of the convolution or linear layer beside it, exactly."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from convette.errors import FileFormatError, StructureError
from convette.surgery._apply import apply
from convette.surgery._edits import Change, ParameterChange, find_module
from convette.surgery._records import Records

_LAYERS = (_ConvNd, nn.Linear)


@dataclass(frozen=True)
class Fold:
    """Fold the batch norm `norm` into the convolution or linear `layer` that feeds it, or that it feeds (`before`).

    Norm after layer: ``W' = s·W``, ``b' = s·(b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``. Norm before
    layer: ``W' = W·s``, ``b' = b + Σ W·(beta - s·mean)``; exact only where nothing is padded with zeros. For
    inference: a folded norm no longer follows the data.
    """

    layer: str
    norm: str
    before: bool = False
    kind: ClassVar[str] = "fold"

    def apply(self, model: nn.Module) -> Change:
        """Change the layer's weight and bias and put the norm's activation, or nothing, in its place.

        Raises `StructureError` where the two do not fit.
        """
        layer, norm = find_module(model, self.layer), find_module(model, self.norm)
        if not isinstance(layer, _LAYERS):
            raise StructureError(
                f"cannot fold into {self.layer!r}: {type(layer).__name__} is no convolution or linear."
            )
        if not _is_batch_norm(norm):
            raise StructureError(f"cannot fold {self.norm!r}: {type(norm).__name__} has no statistics.")
        scale, shift = affine_of(norm)
        change = Change()
        weight, bias = _folded(layer, scale, shift, self)
        old_weight: Any = layer.weight
        old_bias: Any = layer.bias
        new_weight = nn.Parameter(weight.to(old_weight.dtype), requires_grad=old_weight.requires_grad)
        new_bias = nn.Parameter(bias.to(old_weight.dtype), requires_grad=old_weight.requires_grad)
        layer._parameters["weight"], layer._parameters["bias"] = new_weight, new_bias
        owner, leaf = _owner(model, self.norm)
        owner._modules[leaf] = _remains(norm)

        def back() -> None:
            layer._parameters["weight"], layer._parameters["bias"] = old_weight, old_bias
            owner._modules[leaf] = norm

        change.undo.append(back)
        change.parameters[f"{self.layer}.weight"] = ParameterChange(old_weight, new_weight, {})
        if old_bias is not None:
            change.parameters[f"{self.layer}.bias"] = ParameterChange(old_bias, new_bias, {})
        for name, parameter in norm.named_parameters(recurse=False):
            change.parameters[f"{self.norm}.{name}"] = ParameterChange(parameter, None, {})
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "layer": self.layer, "norm": self.norm, "before": self.before}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Fold":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        layer, norm, before = value.get("layer"), value.get("norm"), value.get("before", False)
        if not isinstance(layer, str) or not isinstance(norm, str) or not isinstance(before, bool):
            raise FileFormatError("a 'fold' edit must name a layer and a norm.")
        return Fold(layer, norm, before)


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None and module.running_var is not None
    return type(module).__name__ == "FrozenBatchNorm2d"


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift (float64) a batch norm applies in eval mode."""
    eps = float(norm.eps)  # type: ignore[arg-type]
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()  # type: ignore[union-attr]
    scale = (var + eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()  # type: ignore[operator]
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()  # type: ignore[operator]
    return scale, shift


def _folded(layer: nn.Module, scale: Tensor, shift: Tensor, edit: Fold) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach().double()  # type: ignore[union-attr]
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    groups = int(getattr(layer, "groups", 1))
    bias = layer.bias
    wide = weight.shape[1] * groups if transposed else weight.shape[0]
    start = torch.zeros(wide, dtype=torch.float64, device=weight.device) if bias is None else bias.detach().double()  # type: ignore[union-attr]
    read = (weight.shape[0] if transposed else weight.shape[1] * groups) if edit.before else wide
    if len(scale) != read:
        raise StructureError(f"cannot fold {edit.norm!r} into {edit.layer!r}: {len(scale)} channels meet {read}.")
    if not edit.before:
        if transposed:
            parts = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
            return parts.flatten(0, 1), start * scale + shift
        return weight * scale.view(-1, *[1] * (weight.ndim - 1)), start * scale + shift
    if transposed or (isinstance(layer, _ConvNd) and _pads(layer)):
        raise StructureError(f"cannot fold {edit.norm!r} into {edit.layer!r} after it: the layer pads with zeros.")
    shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
    parts = weight.unflatten(0, (groups, -1))
    added = (parts * shift.view(shape)).flatten(2).sum(2).flatten()
    return (parts * scale.view(shape)).flatten(0, 1), start + added


def _pads(layer: _ConvNd) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding != "valid"
    # Layers that pad by themselves, in their own forward, are told by their class.
    plain = type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return any(layer.padding) or not plain


def _remains(norm: nn.Module) -> nn.Module:
    """Return what a norm does besides normalising: its activation, where it has one."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")]
    modules = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    if not modules:
        return nn.Identity()
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return find_module(model, owner), leaf


def fold_edits(model: nn.Module, example: Any) -> list[Fold]:
    """Return the folds that leave the network's eval output as it is, found by running it once on `example`.

    A batch norm is folded where the one thing it reads is the result of a convolution or linear layer that nothing
    else reads, or where the one thing that reads it is a layer without padding; each runs once, on its own weight.
    """
    from convette.surgery._trace import trace

    return _found(model, trace(model, example).records)


def _found(model: nn.Module, records: Records) -> list[Fold]:
    times: dict[str, int] = {}
    for step in records.steps.values():
        times[step.module] = times.get(step.module, 0) + 1
    result: list[Fold] = []
    taken: set[str] = set()
    for step in records.steps.values():
        source = records.steps.get(step.source)
        if source is None or records.uses.get(step.source, 0) != 1 or times[step.module] + times[source.module] != 2:
            continue
        after = _pair(model, source.module, step.module)
        before = _pair(model, step.module, source.module)
        if after and step.module not in taken:
            result.append(Fold(source.module, step.module))
            taken.add(step.module)
        elif before and source.module not in taken:
            layer, norm = find_module(model, step.module), find_module(model, source.module)
            pads = isinstance(layer, _ConvNd) and (layer.transposed or _pads(layer))
            # A norm with an activation of its own does more than a weight can hold.
            if not pads and isinstance(_remains(norm), nn.Identity):
                result.append(Fold(step.module, source.module, before=True))
                taken.add(source.module)
    return result


def _pair(model: nn.Module, layer: str, norm: str) -> bool:
    one, other = find_module(model, layer), find_module(model, norm)
    return isinstance(one, _LAYERS) and _is_batch_norm(other)


def fold(model: nn.Module, example: Any) -> nn.Module:
    """Return a copy of `model`, in eval mode, with everything folded away that can be exactly; the folds are logged.

    Layers that know what they are at inference become it (`convette.layers.Foldable`), blocks that know their inference
    form take it (timm's RepVGG, MobileOne, FastViT ...); batch norms go into the
    layers beside them; then scales, layers in a row and branches side by side become one where that costs no more.
    The output on any input equals the model's up to rounding (relative error about 1e-6 in float32).
    """
    from convette.surgery._absorb import absorb_edits
    from convette.surgery._folding_more import fold_further, fold_layers, reparameterize

    folded = copy.deepcopy(model).eval()
    fold_layers(folded, example)
    reparameterize(folded, example)
    apply(folded, *absorb_edits(folded, example))
    apply(folded, *fold_edits(folded, example))
    fold_further(folded, example)
    return folded
