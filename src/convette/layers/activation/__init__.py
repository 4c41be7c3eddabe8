"""What stands where activations do: gates, and inhibition before them."""

from convette.layers.activation.atac import ATAC, ATACBasicBlock, ATACBottleneck, ATACResNet, replace_activation
from convette.layers.activation.lateral_inhibition import (
    LateralInhibition2d,
    RingInhibitedConv2d,
    add_inhibition,
    inhibition_sites,
    surround_kernel,
)

__all__ = [
    "ATAC",
    "ATACBasicBlock",
    "ATACBottleneck",
    "ATACResNet",
    "LateralInhibition2d",
    "RingInhibitedConv2d",
    "add_inhibition",
    "inhibition_sites",
    "replace_activation",
    "surround_kernel",
]
