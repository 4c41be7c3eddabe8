"""Poincaré ResNet by name; the network and its layers live in `convette.layers.hyperbolic`."""

from convette.layers.hyperbolic import PoincareResNet
from convette.models._origin import with_origin


@with_origin
def poincare_resnet(num_classes: int = 10, in_channels: int = 3, depth: int = 20, width: int = 8) -> PoincareResNet:
    """Return a Poincaré ResNet of depth 6n + 2 with groups of `width`, 2 `width` and 4 `width` (arXiv 2303.14027)."""
    return PoincareResNet(depth, (width, 2 * width, 4 * width), num_classes, in_channels)
