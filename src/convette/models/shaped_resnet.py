"""Residual networks of any widths and depths: what TAS ends with (room pruning).

The shortcut rule is that of Dong and Yang, Network Pruning via Transformable Architecture Search, arXiv 1905.09717.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.models._origin import attach_origin

# The shape published for ResNet-20 on CIFAR-10: 22.4 M MACs.
PUBLISHED = (16, 6, 4, 4, 4, 4, 4, 32, 32, 12, 19, 32, 28, 64, 64, 64, 64, 64, 44)


@dataclass(frozen=True)
class Shape:
    """Widths and depths of a residual network of basic blocks.

    `channels`: of the images, of the first convolution, then two for each block of the network searched in (its two
    convolutions), dropped blocks included. `kept`: blocks of each stage that stay, the first ones; `blocks`: how many
    each stage had.
    """

    channels: tuple[int, ...]
    kept: tuple[int, ...]
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.channels) != 2 + 2 * sum(self.blocks) or min(self.channels) < 1:
            raise UsageError(
                f"TAS: {len(self.channels)} widths for {sum(self.blocks)} blocks; 2 + 2 a block are needed."
            )
        if len(self.kept) != len(self.blocks) or any(
            not 1 <= k <= n for k, n in zip(self.kept, self.blocks, strict=False)
        ):
            raise UsageError(f"TAS: depths {self.kept} do not fit stages of {self.blocks} blocks.")

    def layers(self) -> list[tuple[int, int, int, int]]:
        """Return (in, middle, out, stride) of every block that stays."""
        found, at, before = [], 2, self.channels[1]
        for stage, (kept, blocks) in enumerate(zip(self.kept, self.blocks, strict=True)):
            for block in range(blocks):
                middle, out = self.channels[at : at + 2]
                at += 2
                if block < kept:
                    found.append((before, middle, out, 2 if stage and not block else 1))
                    before = out
        return found


class ShapedBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: mean and 1x1 convolution at stride 2, a normed 1x1 where widths differ."""

    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, middle, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        if stride > 1:
            self.shortcut: nn.Module = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, out, 1, bias=False))
        elif channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ShapedResNet(nn.Module):
    """The residual network of a `Shape`; all batch norms fold. Images have sides that halve twice (three stages).

    It knows its origin, so it can be saved and loaded like any other network.
    """

    def __init__(self, shape: Shape, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape.channels[0], shape.channels[1], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(shape.channels[1])
        layers = shape.layers()
        self.blocks = nn.Sequential(*(ShapedBlock(*layer) for layer in layers))
        self.linear = nn.Linear(layers[-1][2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        made = {"channels": list(shape.channels[1:]), "kept": list(shape.kept), "blocks": list(shape.blocks)}
        made |= {"num_classes": num_classes, "in_channels": shape.channels[0]}
        attach_origin(self, "convette:shaped_resnet", made)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.blocks(F.relu(self.bn(self.conv(images))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def shaped_resnet(
    num_classes: int = 10,
    in_channels: int = 3,
    channels: tuple[int, ...] = PUBLISHED,
    kept: tuple[int, ...] = (3, 3, 3),
    blocks: tuple[int, ...] = (3, 3, 3),
) -> ShapedResNet:
    """Return a `ShapedResNet` of the widths `channels` (without the images') and depths; by default the published one.

    Raises `UsageError` for widths and depths that do not fit together.
    """
    return ShapedResNet(Shape((in_channels, *channels), tuple(kept), tuple(blocks)), num_classes)


def shape_macs(shape: Shape, size: int, num_classes: int = 10) -> int:
    """Return the MACs of `ShapedResNet` on square images of `size`: convolutions, shortcuts and classifier."""
    total, side = 9 * shape.channels[0] * shape.channels[1] * size * size, size
    layers = shape.layers()
    for before, middle, out, stride in layers:
        side //= stride
        shortcut = before * out if stride > 1 or before != out else 0
        total += side * side * (9 * before * middle + 9 * middle * out + shortcut)
    return total + layers[-1][2] * num_classes
