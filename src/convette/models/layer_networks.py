"""Networks that were published with a layer of `convette.layers`, by name; they live beside their layer."""

from typing import Literal

from torch import nn

from convette.layers.activation import ATACResNet
from convette.layers.attention import autonl_s as _autonl_s
from convette.layers.convolution import QuadraticResNet
from convette.layers.convolution import quadratic_alexnet as _quadratic_alexnet
from convette.layers.regularization import WideResNet
from convette.models._origin import with_origin


@with_origin
def atac_resnet(num_classes: int = 10, in_channels: int = 3, blocks: int = 3, act_layers: int = 4) -> ATACResNet:
    """Return the CIFAR pre-activation ResNet with ATAC; `act_layers` 0 is the ReLU network (arXiv 2007.07729)."""
    return ATACResNet(blocks, num_classes, in_channels, act_layers=act_layers)


@with_origin
def wide_resnet(
    num_classes: int = 10,
    in_channels: int = 3,
    depth: int = 28,
    width: int = 10,
    dropout: Literal["max", "random", "none"] = "max",
    p: float = 0.3,
) -> WideResNet:
    """Return a Wide ResNet with MaxDropout inside its blocks, or another dropout (arXiv 2007.13723)."""
    return WideResNet(depth, width, num_classes, in_channels, dropout=dropout, p=p)


@with_origin
def autonl_s(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """Return AutoNL-S, searched for mobile use, with LightNL layers (arXiv 2004.01961)."""
    return _autonl_s(num_classes, in_channels)


@with_origin
def quadratic_resnet(num_classes: int = 10, in_channels: int = 3, depth: int = 20, rank: int = 0) -> QuadraticResNet:
    """Return a ResNet of quadratic convolutions; `rank` 0: full forms as published, 128 million parameters."""
    return QuadraticResNet(depth, num_classes, in_channels, rank or None)


@with_origin
def quadratic_alexnet(num_classes: int = 10, in_channels: int = 3, rank: int = 0) -> nn.Sequential:
    """Return the small network of quadratic convolutions for 32 px; `rank` 0: full forms, 31 million parameters."""
    return _quadratic_alexnet(num_classes, in_channels, rank=rank or None)
