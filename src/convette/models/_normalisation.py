"""The normalisation that given weights expect, kept with the model they were loaded into."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from convette.surgery import card_of

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
_ATTRIBUTE = "_convette_normalisation"


def known_preprocessing(model: nn.Module) -> Normalisation | None:
    """Return (mean, std) per channel, on the scale 0 to 1, that the weights of `model` expect, or None if unknown.

    Known for models loaded from convette files, for pretrained timm and torchvision weights, and for the published
    CIFAR ResNet weights. An untrained network expects nothing: None.
    """
    saved = card_of(model).preprocessing
    mean, std = saved.get("mean"), saved.get("std")
    if isinstance(mean, list | tuple) and isinstance(std, list | tuple) and mean and len(mean) == len(std):
        return _floats(mean), _floats(std)
    return getattr(model, _ATTRIBUTE, None)


def remember_normalisation(model: nn.Module, mean: Sequence[float], std: Sequence[float], in_channels: int) -> None:
    """Keep (mean, std) with `model`; numbers for RGB are averaged for one channel and dropped for other counts."""
    if in_channels == 1 and len(mean) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if len(mean) == in_channels:
        setattr(model, _ATTRIBUTE, (_floats(mean), _floats(std)))


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
