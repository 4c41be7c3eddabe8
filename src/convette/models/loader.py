"""Making networks by name: ours, ``timm:NAME``, ``torchvision:NAME``, ``module:callable``, or a saved file."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from convette.errors import UsageError, did_you_mean
from convette.models import _adapt
from convette.models._origin import attach_origin

# Name -> the module of this room that defines the constructor, the constructor, and the arguments the name stands for.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet20": ("cifar_resnet", "resnet20", {}),
    "resnet32": ("cifar_resnet", "resnet32", {}),
    "resnet44": ("cifar_resnet", "resnet44", {}),
    "resnet56": ("cifar_resnet", "resnet56", {}),
    "resnet110": ("cifar_resnet", "resnet110", {}),
}
Stem = Literal["default", "small"]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    pretrained: bool = False,
    stem: Stem = "default",
    weights: Path | str | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Return the network `name`, on the CPU, in training mode, knowing its origin.

    Args:
        name: one of `MODELS`, ``timm:NAME``, ``torchvision:NAME`` or ``package.module:callable``.
        num_classes: outputs; None: 10.
        in_channels: channels of the images; None: 3.
        pretrained: fetch the published weights (timm and torchvision only).
        stem: "small" for images of about 16-96 px: no resolution is lost in the stem.
        weights: a file of weights to load, strictly.
        seed: seed of the initial weights; the global random state is then left alone. None: draw from it.

    Raises:
        UsageError: an unknown name (the nearest one is offered), or arguments that the network cannot take.
    """
    classes, channels = 10 if num_classes is None else num_classes, 3 if in_channels is None else in_channels
    with _seeded(seed):
        source, _, rest = name.partition(":")
        if source == "timm" and rest:
            model = _timm(rest, classes, channels, pretrained, stem)
        elif source == "torchvision" and rest:
            model = _torchvision(rest, classes, channels, pretrained, stem)
        else:
            model = _ours(name, classes, channels, stem)
    return model


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield


def _ours(name: str, num_classes: int, in_channels: int, stem: Stem) -> nn.Module:
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}.{did_you_mean(name, MODELS)}")
    module, symbol, arguments = MODELS[name]
    constructor = getattr(importlib.import_module(f"convette.models.{module}"), symbol)
    return constructor(num_classes=num_classes, in_channels=in_channels, **arguments)


def _timm(name: str, num_classes: int, in_channels: int, pretrained: bool, stem: Stem) -> nn.Module:
    import timm

    if "/" in name or ":" in name or not timm.is_model(name):
        raise UsageError(f"unknown model 'timm:{name}'.{did_you_mean(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    if stem == "small":
        size = model.pretrained_cfg.get("input_size", (3, 224, 224))
        _adapt.use_small_stem(model, torch.zeros(1, in_channels, *size[1:]), f"timm:{name}")
    return attach_origin(model, f"timm:{name}", {"num_classes": num_classes, "in_channels": in_channels, "stem": stem})


def _torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool, stem: Stem) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise UsageError(f"unknown model 'torchvision:{name}'.{did_you_mean(name, names)}")
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, num_classes=num_classes)
    side = 299 if name == "inception_v3" else 224
    if in_channels != 3:
        _adapt.use_in_channels(model, torch.zeros(1, 3, side, side), in_channels)
    if stem == "small":
        _adapt.use_small_stem(model, torch.zeros(1, in_channels, side, side), f"torchvision:{name}")
    return attach_origin(
        model, f"torchvision:{name}", {"num_classes": num_classes, "in_channels": in_channels, "stem": stem}
    )
