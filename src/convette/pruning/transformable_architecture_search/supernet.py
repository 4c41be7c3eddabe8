"""The supernet: one convolution and a batch norm a width for every layer, two widths sampled and mixed in each pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.pruning.transformable_architecture_search.choices import (
    channel_interpolation,
    depth_choices,
    depth_probabilities,
    two_choices,
    width_choices,
)
from convette.pruning.transformable_architecture_search.shapes import Shape, shape_macs

Sample = tuple[tuple[int, int], Tensor]


class SearchConv(nn.Module):
    """A convolution that gives a mixture of two of its widths. Missing input channels are padded with zeros."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.widths = width_choices(outs)
        self.conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) if norm else nn.Identity() for width in self.widths])

    def forward(self, x: Tensor, sample: Sample) -> Tensor:
        """Return the mixture of the two sampled widths, aligned to the larger."""
        (one, other), weights = sample
        missing = self.conv.in_channels - x.shape[1]
        y = self.conv(F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)
        largest = max(self.widths[one], self.widths[other])
        mixed = [
            channel_interpolation(self.norms[number](y[:, : self.widths[number]]), largest) for number in (one, other)
        ]
        return weights[0] * mixed[0] + weights[1] * mixed[1]


class SearchBlock(nn.Module):
    """A basic block of searched convolutions; at the add the first channels both have are summed, the rest copied."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.first = SearchConv(ins, outs, 3, stride)
        self.second = SearchConv(outs, outs, 3)
        self.shortcut = SearchConv(ins, outs, 1, norm=False) if stride > 1 else None

    def forward(self, x: Tensor, samples: Sequence[Sample]) -> Tensor:
        """Return the block's output for the samples of its two convolutions."""
        y = self.second(F.relu(self.first(x, samples[0])), samples[1])
        side = self.shortcut(F.avg_pool2d(x, 2), samples[1]) if self.shortcut is not None else x
        few, many = sorted((y, side), key=lambda one: one.shape[1])
        added = many[:, : few.shape[1]] + few
        return F.relu(torch.cat([added, many[:, few.shape[1] :]], dim=1))


class SearchResNet(nn.Module):
    """The supernet over a CIFAR ResNet of three stages.

    `width_logits` (a row a convolution) and `depth_logits` (one vector a stage) are the architecture; `architecture`
    gives them, `weights` all else. `temperature` of the sampling; `generator` of its noise.
    """

    def __init__(
        self,
        blocks: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.blocks, self.widths, self.num_classes, self.in_channels = blocks, widths, num_classes, in_channels
        self.temperature, self.generator = 5.0, torch.Generator().manual_seed(seed)
        self.stem = SearchConv(in_channels, widths[0], 3)
        self.stages = nn.ModuleList()
        before = widths[0]
        for number, width in enumerate(widths):
            stage = [
                SearchBlock(before if not block else width, width, 2 if number and not block else 1)
                for block in range(blocks)
            ]
            self.stages.append(nn.ModuleList(stage))
            before = width
        self.linear = nn.Linear(widths[-1], num_classes)
        draw = torch.Generator().manual_seed(seed)
        convolutions = 1 + 2 * blocks * len(widths)
        self.width_logits = nn.Parameter(0.01 * torch.randn(convolutions, 8, generator=draw))
        depths = len(depth_choices(blocks))
        self.depth_logits = nn.Parameter(0.01 * torch.randn(len(widths), depths, generator=draw))

    def architecture(self) -> list[nn.Parameter]:
        """Return the parameters that say which sizes are likely."""
        return [self.width_logits, self.depth_logits]

    def weights(self) -> list[nn.Parameter]:
        """Return all other parameters."""
        mine = {id(parameter) for parameter in self.architecture()}
        return [parameter for parameter in self.parameters() if id(parameter) not in mine]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits for widths and depths drawn anew."""
        samples = [two_choices(row, self.temperature, self.generator) for row in self.width_logits]
        x, at = F.relu(self.stem(images, samples[0])), 1
        for stage, logits in zip(self.stages, self.depth_logits, strict=True):
            kept = []
            assert isinstance(stage, nn.ModuleList)
            for number, block in enumerate(stage, start=1):
                x = block(x, samples[at : at + 2])
                at += 2
                if number in depth_choices(self.blocks):
                    kept.append(x)
            noise = -torch.empty(len(kept)).exponential_(generator=self.generator).log()
            chances = ((logits.log_softmax(0) + noise) / self.temperature).softmax(0)
            largest = max(one.shape[1] for one in kept)
            x = sum(
                (p * channel_interpolation(one, largest) for p, one in zip(chances, kept, strict=True)), x.new_zeros(())
            )
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return F.linear(x, self.linear.weight[:, : x.shape[1]], self.linear.bias)

    def shape(self) -> Shape:
        """Return the most probable widths and depths."""
        choices = [width_choices(width) for width in self._full()]
        channels = [row[int(index)] for row, index in zip(choices, self.width_logits.argmax(1), strict=True)]
        depths = depth_choices(self.blocks)
        kept = tuple(depths[int(index)] for index in self.depth_logits.argmax(1))
        return Shape((self.in_channels, *channels), kept, (self.blocks,) * len(self.widths))

    def whole(self) -> Shape:
        """Return the largest widths and depths."""
        return Shape(
            (self.in_channels, *self._full()), (self.blocks,) * len(self.widths), (self.blocks,) * len(self.widths)
        )

    def expected_macs(self, size: int) -> Tensor:
        """Return the expected MACs (in millions) on square images of `size`, with its gradient to the architecture."""
        chances = self.width_logits.softmax(1)
        table = torch.tensor([width_choices(width) for width in self._full()], dtype=chances.dtype)
        expected = (chances * table).sum(1)
        total, side, before, at = 9 * self.in_channels * expected[0] * size * size, size, expected[0], 1
        for number, logits in enumerate(self.depth_logits):
            reach = depth_probabilities(logits, self.blocks)
            for block in range(self.blocks):
                middle, out = expected[at], expected[at + 1]
                at += 2
                stride = 2 if number and not block else 1
                side //= stride
                cost = 9 * before * middle + 9 * middle * out + (before * out if stride > 1 else 0)
                total = total + reach[block] * side * side * cost
                before = out
        return (total + before * self.num_classes) / 1e6

    def macs(self, size: int) -> float:
        """Return the MACs (in millions) of the most probable shape on square images of `size`."""
        return shape_macs(self.shape(), size, self.num_classes) / 1e6

    def _full(self) -> list[int]:
        return [self.widths[0], *(width for width in self.widths for _ in range(2 * self.blocks))]
