"""YOLOv3: Darknet-53, three heads, anchors; the decoding of its boxes, and weights for rare classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError

ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
STAGES = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))


def _unit(ins: int, outs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outs), nn.LeakyReLU(0.1)
    )


class Residual(nn.Module):
    """``x + unit3x3(unit1x1(x))``: no activation behind the sum, so leaving it out is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _unit(channels, channels // 2, 1)
        self.second = _unit(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.second(self.first(x))


class Head(nn.Module):
    """Five convolutions, of which the last goes on to the next scale, and two that predict."""

    def __init__(self, ins: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _unit(ins, middle, 1),
            _unit(middle, 2 * middle, 3),
            _unit(2 * middle, middle, 1),
            _unit(middle, 2 * middle, 3),
            _unit(2 * middle, middle, 1),
        )
        self.tip = nn.Sequential(_unit(middle, 2 * middle, 3), nn.Conv2d(2 * middle, outputs, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what goes on, and the predictions."""
        y = self.body(x)
        return y, self.tip(y)


class YOLOv3(nn.Module):
    """The detector: images to three maps of ``3 * (5 + classes)`` channels at strides 32, 16 and 8 (`decode`).

    `width` multiplies all channels. 80 classes: 61,949,149 parameters, 32.9 G MACs at 416 px. Images have sides that
    are multiples of 32. Source: Redmon and Farhadi, YOLOv3, arXiv 1804.02767.
    """

    def __init__(self, num_classes: int = 80, width: float | int = 1.0, in_channels: int = 3) -> None:
        super().__init__()
        if num_classes < 1 or not width > 0:
            raise UsageError(f"YOLOv3: num_classes = {num_classes} must be at least 1 and width = {width} above 0.")

        def wide(channels: int) -> int:
            return max(2, 2 * round(channels * width / 2))

        self.num_classes = num_classes
        self.stem = _unit(in_channels, wide(32), 3)
        self.stages, before = nn.ModuleList(), wide(32)
        for channels, blocks in STAGES:
            after = wide(channels)
            self.stages.append(
                nn.Sequential(_unit(before, after, 3, 2), nn.Sequential(*(Residual(after) for _ in range(blocks))))
            )
            before = after
        outputs, middles = 3 * (5 + num_classes), [wide(512), wide(256), wide(128)]
        routes = [wide(512) // 2, wide(256) // 2]
        ins = [wide(1024), wide(512) + routes[0], wide(256) + routes[1]]
        self.heads = nn.ModuleList([Head(a, m, outputs) for a, m in zip(ins, middles, strict=True)])
        self.routes = nn.ModuleList([_unit(m, r, 1) for m, r in zip(middles[:2], routes, strict=True)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the raw maps, coarse to fine."""
        x, kept = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        found, x = [], kept[-1]
        for number, head in enumerate(self.heads):
            x, prediction = head(x)
            found.append(prediction)
            if number < 2:
                x = torch.cat([F.interpolate(self.routes[number](x), scale_factor=2.0), kept[-2 - number]], dim=1)
        return found[0], found[1], found[2]


def decode(maps: Sequence[Tensor], size: int, num_classes: int, anchors: Any = ANCHORS) -> Tensor:
    """Return the boxes ``(n, boxes, 5 + classes)``: centre x, y, width, height (pixels), objectness, classes.

    `anchors`: width and height in pixels, three a map, coarse to fine; the default is YOLOv3's, for 416 pixels.
    """
    result = []
    for raw, shapes in zip(maps, anchors, strict=True):
        images, _, rows, columns = raw.shape
        x = raw.view(images, 3, 5 + num_classes, rows, columns).permute(0, 1, 3, 4, 2)
        stride = size / rows
        grid_y, grid_x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (x[..., :2].sigmoid() + torch.stack([grid_x, grid_y], dim=-1)) * stride
        sizes = torch.tensor(shapes, dtype=x.dtype).view(1, 3, 1, 1, 2) * x[..., 2:4].exp()
        result.append(torch.cat([centre, sizes, x[..., 4:].sigmoid()], dim=-1).flatten(1, 3))
    return torch.cat(result, dim=1)


def class_weights(counts: Sequence[int] | Tensor, beta: float = 0.999) -> Tensor:
    r"""Return weights that make up for rare classes: :math:`w_k \propto (1 - \beta) / (1 - \beta^{n_k})`, of mean 1.

    `counts`: boxes of each class. Equal counts give ones. Raises `UsageError` for a class without boxes.
    """
    boxes = torch.as_tensor(counts, dtype=torch.float64)
    if not len(boxes) or bool((boxes < 1).any()):
        raise UsageError("class weights: every class needs at least one box.")
    weights = (1 - beta) / (1 - beta**boxes)
    return (weights / weights.mean()).float()
