"""Running a network to look inside it, and leaving nothing behind: no hook, no mode, no gradient, no random number."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean
from convette.layers._watching import hooked, in_eval


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put `model` into eval mode; on leaving, every module's mode and the random state are as they were."""
    with in_eval(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@dataclass
class Tap:
    """What one module gave out: its map as (n, c, i, j), and the network's output of the same run."""

    features: Tensor
    output: Any


def run_with_tap(model: nn.Module, layer: str, images: Tensor, *, gradient: bool) -> Tap:
    """Run `model` on `images` once and keep the output of the module `layer` (of its last call, if it runs often).

    The kept map is apart from what the network goes on with, so that an in-place activation after the layer changes
    nothing. With `gradient`, it is a leaf that ``torch.autograd.grad`` can differentiate by: the graph starts there,
    and parameters need not require gradients.

    Raises:
        UsageError: an unknown module, one that did not run, or one that gives out something else than one map.
    """
    module = find_module(model, layer)
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UsageError(
                f"layer {layer!r} gives out {_shape(output)}, not one map (n, c, h, w); choose another layer."
            )
        features = output.detach().clone()
        kept[:] = [features.requires_grad_() if gradient else features]
        return features.clone() if gradient else output

    handle = module.register_forward_hook(keep)
    with hooked([handle]), torch.set_grad_enabled(gradient), undisturbed(model, images.device):
        output = model(images)
    if not kept:
        raise UsageError(f"layer {layer!r} did not run on these images; choose another layer.")
    return Tap(kept[0], output)


def find_module(model: nn.Module, layer: str) -> nn.Module:
    """Return the module of that name; a misspelt one is answered with the nearest."""
    try:
        return model.get_submodule(layer)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise UsageError(f"no layer {layer!r} in this network.{did_you_mean(layer, names)}") from None


def name_of(model: nn.Module, layer: str | nn.Module) -> str:
    """Return the name of a layer given by name or as the module itself."""
    if isinstance(layer, str):
        find_module(model, layer)
        return layer
    for name, module in model.named_modules():
        if module is layer:
            return name
    raise UsageError(f"the given layer ({type(layer).__name__}) is not part of this network.")


def channels_first(features: Tensor, layer: str) -> Tensor:
    """Return a map as (n, c, i, j). Square maps with channels last, as transformers make them, are recognised."""
    if features.shape[1] == features.shape[2] != features.shape[3]:
        features = features.permute(0, 3, 1, 2)
    if not bool(torch.isfinite(features.detach()).all()):
        raise UsageError(
            f"layer {layer!r} gives out values that are not finite; the network cannot be explained there."
        )
    return features


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"


Score = Callable[[Any], Tensor]
