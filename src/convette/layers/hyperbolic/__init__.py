"""Layers and networks on the Poincaré ball."""

from convette.layers.hyperbolic._ball import PoincareBall
from convette.layers.hyperbolic._network import PoincareBlock, PoincareResNet, poincare_resnet, to_poincare
from convette.layers.hyperbolic.poincare_resnet import (
    PoincareAdd,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
    beta_ratio,
)

__all__ = [
    "PoincareAdd",
    "PoincareBall",
    "PoincareBatchNorm2d",
    "PoincareBlock",
    "PoincareConv2d",
    "PoincareLinear",
    "PoincareResNet",
    "beta_ratio",
    "poincare_resnet",
    "to_poincare",
]
