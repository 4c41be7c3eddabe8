"""Putting quantised layers into any network, as logged edits, and packing them afterwards."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convette._progress import note
from convette.errors import ConvetteError, StructureError
from convette.layers._watching import hooked, in_eval
from convette.layers.quantization.deployed import quantized_layers
from convette.layers.quantization.fake_quantize import QuantConv2d, QuantLinear
from convette.layers.quantization.packed import PackedConv2d, PackedLinear
from convette.surgery import Convert, apply, fold_edits

HOME = "convette.layers.quantization"


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linears of `model` that can be quantised, by name, in the model's order."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros"))
    }


def edits_to_quantize(
    model: nn.Module,
    bits: int | Mapping[str, int],
    activation_bits: int | Mapping[str, int] = 8,
    scale_groups: int | Mapping[str, int | None] | None = None,
) -> list[Convert]:
    """Return the edits that put quantised layers in the place of convolutions and linears (those `bits` names, if a
    mapping). Raises `StructureError` where there are none."""
    found = quantizable(model)
    wanted = [name for name in found if not isinstance(bits, Mapping) or name in bits]
    if not wanted:
        raise StructureError(f"{type(model).__name__} has no convolution or linear layer that could be quantised.")
    edits = []
    for name in wanted:
        given = {"bits": _of(bits, name), "activation_bits": _of(activation_bits, name)}
        groups = _of(scale_groups, name)
        if groups is not None:
            given["scale_groups"] = groups
        kind = "Quant" + ("Linear" if isinstance(found[name], nn.Linear) else "Conv2d")
        edits.append(Convert(name, f"{HOME}:{kind}", {**_arguments(found[name]), **given}, keep_activation=False))
    return edits


def layer_bits(model: nn.Module, bits: int, ends_8_bits: bool) -> dict[str, int]:
    """Return the bits of each layer that can be quantised: `bits`, but 8 for the first and last if asked."""
    names = list(quantizable(model))
    widths = dict.fromkeys(names, bits)
    if ends_8_bits and names:
        widths[names[0]] = widths[names[-1]] = max(bits, 8)
    return widths


def quantize_layers(
    model: nn.Module,
    example: Tensor,
    images: Tensor,
    *,
    bits: int = 8,
    activation_bits: int = 8,
    scale_groups: int | None = None,
    ends_8_bits: bool = True,
    observer: str = "mse",
    edit: Callable[..., Any] | None = None,
) -> nn.Module:
    """Put trainable quantised layers into a trained `model`, in place and logged; returns it, ready to be trained on.

    Batch norms are folded first, so that what is rounded in training is what is stored. Weights and inputs of every
    convolution and linear get learned steps (see `QuantConv2d`), with ranges from `images` (preprocessed, ``n c h w``).
    `ends_8_bits`: the first and the last layer keep 8 bits. `scale_groups`: scales a layer, None: one a channel.
    `edit`: what carries edits out, None: `convette.surgery.apply` (a trainer has its own).

    Export the trained network as any other: `convette.export` writes integers. Raises `DataError` for images no range
    can be learnt from, `StructureError` where no layer can be quantised.
    """
    carry_out = edit or (lambda edits: apply(model, *edits))
    with in_eval(model):
        folds = fold_edits(model, example)
        if folds:
            carry_out(folds)
        widths = layer_bits(model, bits, ends_8_bits)
        activations = layer_bits(model, activation_bits, ends_8_bits and activation_bits > 0)
        carry_out(edits_to_quantize(model, widths, activations, scale_groups))
        calibrate(model, images, observer)
    return model


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Tensor,
    observer: str = "mse",
    assignment: str = "sorted",
    batch_size: int = 32,
) -> None:
    """Set the scales of all quantised layers: weights by least squared error, inputs by what `images` give there.

    The inputs are those of the float network: every layer is calibrated on what it will be asked to imitate. A layer
    whose input is zero on every image (behind dead units) keeps its range, which is as good as any there, and a note
    says so. Raises `DataError` for activations that are not finite; the message names the layer.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        if isinstance(layer, QuantConv2d | QuantLinear):
            layer.calibrate_weight(assignment)
    seen = _inputs(model, layers, images, batch_size)
    for name, layer in layers.items():
        if len(seen[name]) and not seen[name].any():
            note(f"layer {name}: its input is zero on every calibration image; its range stays as it is.")
            continue
        try:
            layer.activation.calibrate(seen[name], observer)
        except ConvetteError as error:
            raise type(error)(f"layer {name}: {error}") from error


def _inputs(model: nn.Module, layers: Mapping[str, Any], images: Tensor, batch_size: int) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    # As many values of each layer as say enough; all of small networks.
    most = 1 << 16
    for name, layer in layers.items():

        def keep(module: nn.Module, inputs: Any, name: str = name) -> None:
            flat = inputs[0].detach().flatten()
            extremes = torch.stack([flat.min(), flat.max()])
            kept[name].append(torch.cat([flat[:: max(1, len(flat) // most)], extremes]))

        handles.append(layer.register_forward_pre_hook(keep))
    try:
        for layer in layers.values():
            layer.forward = _plain(layer)
        with hooked(handles), in_eval(model):
            for part in images.split(batch_size):
                model(part)
    finally:
        for layer in layers.values():
            del layer.forward
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in kept.items()}


def _plain(layer: Any) -> Any:
    if isinstance(layer, QuantConv2d):
        return lambda x: layer._conv_forward(x, layer.weight, layer.bias)
    return lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def pack_layers(model: nn.Module) -> nn.Module:
    """Put packed layers in the place of all trainable quantised ones, in place and logged; returns `model`."""
    edits = []
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, PackedConv2d | PackedLinear):
            continue
        given = {"bits": layer.bits, "activation_bits": layer.activation.bits, "scale_groups": len(layer.log_scale)}
        kind = "Packed" + ("Linear" if isinstance(layer, nn.Linear) else "Conv2d")
        edits.append(Convert(name, f"{HOME}:{kind}", {**_arguments(layer), **given}, keep_activation=False))
    if edits:
        apply(model, *edits)
    return model.eval()


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else value


def _arguments(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        names: tuple[str, ...] = ("in_features", "out_features")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    found = {name: getattr(layer, name) for name in names}
    return {**found, "bias": layer.bias is not None}
