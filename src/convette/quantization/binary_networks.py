"""What binary networks cost: their multiply-accumulates and bytes (arXiv 1603.05279)."""

from dataclasses import dataclass

from torch import Tensor, nn

from convette.cost import count
from convette.layers.quantization.binary_networks import BinaryConv2d, PackedBinaryConv2d

LANES = 64  # signs a word holds


@dataclass(frozen=True)
class BinaryCost:
    """MACs of signs and of reals, weights likewise, and the bytes stored at one bit a binary weight, four bytes a real.

    `effective_macs`: reals, and a 64th of the signs (a word at a time).
    """

    binary_macs: int
    real_macs: int
    binary_weights: int
    real_parameters: int

    @property
    def effective_macs(self) -> float:
        """The MACs of reals plus words of signs."""
        return self.real_macs + self.binary_macs / LANES

    @property
    def size(self) -> int:
        """Bytes of the weights, one bit a binary one; scales of filters fold into the norms behind them."""
        return -(-self.binary_weights // 8) + 4 * self.real_parameters


def binary_cost(network: nn.Module, example: Tensor) -> BinaryCost:
    """Return what `network` costs on `example` (``n c h w``), signs and reals apart."""
    cost = count(network, example)
    kinds = (BinaryConv2d, PackedBinaryConv2d)
    binary = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    macs = sum(layer.macs for layer in cost.layers if layer.name in binary)
    weights = sum(
        module.weight.numel() if isinstance(module, BinaryConv2d) else module.stored_weights
        for module in network.modules()
        if isinstance(module, BinaryConv2d | PackedBinaryConv2d)
    )
    return BinaryCost(macs, cost.macs - macs, weights, cost.parameters - weights)
