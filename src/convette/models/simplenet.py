"""SimpleNet: thirteen plain convolutions with batch norm and max-pooling, no branches (Hasanpour et al. 2016).

Each network is one chain, which makes it the easiest to prune, fold, quantise and export.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from convette._typing import Images, Logits
from convette.errors import UsageError
from convette.models._origin import with_origin

# A plan lists the layers: a number is a 3x3 convolution of that width, k-number a 1x1 convolution, P a 2x2 max-pool.
_CIFAR_310K = "64 32 32 32 P 32 32 64 P 64 64 P 128 k256 k64 P 64"
_CIFAR_460K = "32 32 32 64 P 64 64 64 P 64 64 P 96 k96 k96 P 100"
_CIFAR_5M = "64 128 128 128 P 128 128 256 P 256 256 P 512 k2048 k256 P 256"
_CIFAR_5M_EXTRA_POOL = "64 128 128 128 P 128 128 256 P 256 256 P 512 P k2048 k256 P 256"
_IMAGENET_5M = "64 128 128 128 128 128 P 256 256 256 512 P k2048 k256 256"
_IMAGENET_9M = "128 192 192 192 192 192 P 320 320 320 640 P k2560 k320 320"

# Strides of the first convolutions; all later ones have stride 1. m1 is the fastest, m4 the most accurate.
_STRIDES: dict[str, tuple[int, ...]] = {
    "m1": (2, 2, 2),
    "m2": (2, 2, 1, 2),
    "m3": (2, 2, 1, 1, 2),
    "m4": (2, 1, 2, 1, 2, 1),
}
Mode = Literal["m1", "m2", "m3", "m4"]
Stem = Literal["default", "small"]


class SimpleNet(nn.Module):
    """A chain of convolution, batch norm and ReLU with a few max-pools, then global max-pooling and a linear layer.

    ``x <- dropout(relu(bn(conv(x))))`` for every layer of the plan, ``logits = linear(max over positions of x)``.

    Args:
        plan: layers, separated by blanks: ``64`` is a 3x3 convolution of width 64 (padding 1, with bias), ``k64`` a 1x1
            convolution (padding 0), ``P`` a 2x2 max-pool.
        num_classes: outputs.
        in_channels: channels of the images.
        strides: strides of the first convolutions; the others have 1.
        scale: factor on every width, rounded (halves to even).
        dropout: channel dropout rate, one for all layers or one a layer (pools count as layers) and one more for after
            the global pool.

    Raises:
        UsageError: unknown layers in the plan, the wrong number of rates, or images smaller than the pools allow.

    All batch norms fold into their convolutions; what is left is thirteen convolutions, ReLU, max-pools, one linear.
    The convolution biases are redundant until then and are counted by the published figures.

    Source: Lets keep it simple, Using simple architectures to outperform deeper and more complex architectures,
    Hasanpour et al. 2016, arXiv 1608.06037.
    """

    def __init__(
        self,
        plan: str,
        num_classes: int = 10,
        in_channels: int = 3,
        strides: Sequence[int] = (),
        scale: float = 1.0,
        dropout: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        layers = plan.split()
        rates = _rates(dropout, len(layers))
        remaining = iter(strides)
        self.features = nn.Sequential()
        self.reduction = 1
        channels = in_channels
        for layer, rate in zip(layers, rates, strict=False):
            if layer == "P":
                block = nn.Sequential(nn.MaxPool2d(2))
                self.reduction *= 2
            else:
                kernel, width = _convolution(layer)
                stride, width = next(remaining, 1), max(1, round(width * scale))
                block = _layer(channels, width, kernel, stride)
                self.reduction *= stride
                channels = width
            if rate:
                block.append(nn.Dropout2d(rate))
            self.features.append(block)
        # One channel has one value by now: dropping channels and dropping values are the same thing.
        self.dropout: nn.Module = nn.Dropout(rates[-1]) if rates[-1] else nn.Identity()
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))

    def forward(self, images: Images) -> Logits:
        self._check_size(images)
        x = self.features(images)
        return self.classifier(self.dropout(torch.amax(x, dim=(2, 3))))

    def _check_size(self, images: Tensor) -> None:
        if min(images.shape[-2:]) < self.reduction:
            raise UsageError(
                f"images of {images.shape[-2]}x{images.shape[-1]} vanish in this SimpleNet, which reduces them"
                f" {self.reduction}-fold: use stem 'small' or images of at least {self.reduction} px."
            )


def _convolution(layer: str) -> tuple[int, int]:
    """Return (kernel size, width) of a layer of a plan."""
    width = layer.removeprefix("k")
    if not width.isdecimal():
        raise UsageError(f"SimpleNet plan: unknown layer {layer!r}; known are WIDTH (3x3), kWIDTH (1x1) and P (pool).")
    return (1 if layer.startswith("k") else 3), int(width)


def _layer(in_channels: int, width: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2),
        nn.BatchNorm2d(width, momentum=0.05),
        nn.ReLU(inplace=True),
    )


def _rates(dropout: float | Sequence[float], layers: int) -> list[float]:
    if isinstance(dropout, int | float):
        return [float(dropout)] * (layers + 1)
    if len(dropout) != layers + 1:
        raise UsageError(
            f"SimpleNet dropout: {len(dropout)} rates for {layers} layers; give one rate, or {layers + 1} (one a layer,"
            " pools included, and one for after the global pool)."
        )
    return list(dropout)


def _cifar(plan: str, num_classes: int, in_channels: int, stem: Stem, dropout: float) -> SimpleNet:
    if stem == "small":  # images below 16 px would vanish in the last pool
        head, _, tail = plan.rpartition(" P ")
        plan = f"{head} {tail}"
    return SimpleNet(plan, num_classes, in_channels, dropout=dropout)


def _imagenet(
    plan: str, num_classes: int, in_channels: int, mode: Mode, scale: float, stem: Stem, dropout: float
) -> SimpleNet:
    if mode not in _STRIDES:
        raise UsageError(f"SimpleNet mode {mode!r}: known are {', '.join(_STRIDES)}.")
    strides = () if stem == "small" else _STRIDES[mode]
    return SimpleNet(plan, num_classes, in_channels, strides, scale, dropout)


@with_origin
def simplenet_cifar_310k(
    num_classes: int = 10, in_channels: int = 3, stem: Stem = "default", dropout: float = 0.0
) -> SimpleNet:
    """Return the smallest CIFAR SimpleNet: 312,362 parameters, 55,788,160 MACs at 3x32x32 (arXiv 1608.06037).

    `stem` "small" leaves out the last pool, for images of 8 to 15 px.
    """
    return _cifar(_CIFAR_310K, num_classes, in_channels, stem, dropout)


@with_origin
def simplenet_cifar_460k(
    num_classes: int = 10, in_channels: int = 3, stem: Stem = "default", dropout: float = 0.0
) -> SimpleNet:
    """Return the CIFAR SimpleNet named 460k: 385,790 parameters by its definition, 73,189,864 MACs at 3x32x32.

    `stem` "small" leaves out the last pool, for images of 8 to 15 px. Source: arXiv 1608.06037.
    """
    return _cifar(_CIFAR_460K, num_classes, in_channels, stem, dropout)


@with_origin
def simplenet_cifar_5m(
    num_classes: int = 10, in_channels: int = 3, stem: Stem = "default", dropout: float = 0.0
) -> SimpleNet:
    """Return the CIFAR SimpleNet of the paper: 5,498,378 parameters, 652,151,296 MACs at 3x32x32 (arXiv 1608.06037).

    `stem` "small" leaves out the last pool, for images of 8 to 15 px.
    """
    return _cifar(_CIFAR_5M, num_classes, in_channels, stem, dropout)


@with_origin
def simplenet_cifar_5m_extra_pool(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> SimpleNet:
    """Return the early PyTorch port with one more pool, kept for its old checkpoint: 631,507,456 MACs at 3x32x32."""
    return SimpleNet(_CIFAR_5M_EXTRA_POOL, num_classes, in_channels, dropout=dropout)


@with_origin
def simplenet_5m(
    num_classes: int = 1000,
    in_channels: int = 3,
    mode: Mode = "m1",
    scale: float = 1.0,
    stem: Stem = "default",
    dropout: float = 0.0,
) -> SimpleNet:
    """Return the ImageNet SimpleNet: 5,752,808 parameters; 1.34 (m1) to 2.73 (m4) G MACs at 224 px (arXiv 1608.06037).

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        mode: how the first convolutions reduce the image, "m1" (fastest) to "m4" (most accurate).
        scale: factor on every width; 0.75 and 0.5 are published.
        stem: "small" gives all convolutions stride 1, for small images.
        dropout: channel dropout rate after every layer.
    """
    return _imagenet(_IMAGENET_5M, num_classes, in_channels, mode, scale, stem, dropout)


@with_origin
def simplenet_9m(
    num_classes: int = 1000,
    in_channels: int = 3,
    mode: Mode = "m1",
    scale: float = 1.0,
    stem: Stem = "default",
    dropout: float = 0.0,
) -> SimpleNet:
    """Return the wide ImageNet SimpleNet: 9,508,968 parameters; 2.77 (m1) to 6.42 (m4) G MACs at 224 px.

    Arguments as in `simplenet_5m`. Source: arXiv 1608.06037.
    """
    return _imagenet(_IMAGENET_9M, num_classes, in_channels, mode, scale, stem, dropout)
