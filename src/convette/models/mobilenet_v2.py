"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al. 2018), and its SSDLite and DeepLabv3 forms.

Parameter names of the classifier are those of torchvision, so that its published weights load strictly.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images, Logits
from convette.errors import UsageError
from convette.models._origin import with_origin

Stem = Literal["default", "small"]

# Rows of the paper's table 2: expansion t, channels c, blocks n, stride s of the first block.
_ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM_CHANNELS, _LAST_CHANNELS = 32, 1280


def round8(channels: float) -> int:
    """Return the multiple of 8 nearest to `channels`, at least 8 and at least 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _convolution(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1, bn: float = 0.1
) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU6."""
    padding = (kernel - 1) // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(channels, momentum=bn),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """A block between two thin ends: 1x1 expansion, 3x3 depthwise, 1x1 projection without an activation.

    ``y = bn(project(relu6(bn(depthwise(relu6(bn(expand(x))))))))``, plus x if the stride is 1 and the widths agree. The
    thin end is linear because ReLU loses information in few channels.

    Args:
        in_channels: k.
        channels: k'.
        stride: of the depthwise convolution.
        expansion: t; 1 leaves the expansion out.
        dilation: of the depthwise convolution.
        bn_momentum: share of each batch in the running statistics.

    Cost at stride 1: h·w·k·t·(k + 9 + k') MACs. Folds to three convolutions with bias.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        expansion: int = 6,
        dilation: int = 1,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.stride = stride
        self.conv = nn.Sequential()
        if expansion != 1:
            self.conv.append(_convolution(in_channels, hidden, 1, bn=bn_momentum))
        self.conv.append(_convolution(hidden, hidden, 3, stride, hidden, dilation, bn_momentum))
        self.conv.append(nn.Conv2d(hidden, channels, 1, bias=False))
        self.conv.append(nn.BatchNorm2d(channels, momentum=bn_momentum))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.conv(x)
        return x + y if self.residual else y


def _features(
    in_channels: int, width: float, stem: Stem, bn: float, last: bool = True, output_stride: int = 32
) -> tuple[nn.Sequential, int]:
    """Return the stem, the 17 blocks and (if `last`) the 1x1 convolution to 1280, and the channels that come out.

    Past `output_stride` strides become dilation, in the layers after the stride taken out.
    """
    if width <= 0:
        raise UsageError(f"MobileNetV2 width {width}: must be above 0 (published: 0.35, 0.5, 0.75, 1.0, 1.3, 1.4).")
    channels = round8(_STEM_CHANNELS * width)
    layers: list[nn.Module] = [_convolution(in_channels, channels, 3, 1 if stem == "small" else 2, bn=bn)]
    reduction, dilation = 2, 1
    for row, (expansion, c, blocks, stride) in enumerate(_ROWS):
        if stem == "small" and row < 2:
            stride = 1
        wanted, next_dilation = stride, dilation
        if reduction * wanted > output_stride:
            stride, next_dilation = 1, dilation * wanted
        reduction *= stride
        out = round8(c * width)
        for block in range(blocks):
            layers.append(InvertedResidual(channels, out, stride if block == 0 else 1, expansion, dilation, bn))
            channels, dilation = out, next_dilation
    if last:
        out = round8(_LAST_CHANNELS * max(1.0, width))
        layers.append(_convolution(channels, out, 1, bn=bn))
        channels = out
    return nn.Sequential(*layers), channels


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class MobileNetV2(nn.Module):
    """MobileNetV2 for classification: stem, 17 inverted residuals, 1x1 convolution, average pooling, linear.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: multiplier of every width, rounded to multiples of 8; the 1280 of the last convolution only grows.
        stem: "small" (for 32 px): the stem and the first two rows have stride 1, 8-fold reduction instead of 32-fold.
        dropout: rate before the linear layer.
        bn_momentum: share of each batch in the running statistics. The reference's 0.01 is for its hundreds of
            thousands of steps; PyTorch's 0.1 also serves short trainings.

    Raises:
        UsageError: a width that is not above 0.

    Cost at 224 px, 1000 classes: width 1.0 has 3,504,872 parameters and 300,774,272 MACs. All batch norms fold.

    Source: MobileNetV2: Inverted Residuals and Linear Bottlenecks, Sandler et al. 2018, arXiv 1801.04381.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: Stem = "default",
        dropout: float = 0.2,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.features, channels = _features(in_channels, width, stem, bn_momentum)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        _initialise(self)

    def forward(self, images: Images) -> Logits:
        x = F.adaptive_avg_pool2d(self.features(images), 1)
        return self.classifier(torch.flatten(x, 1))


def _separable(in_channels: int, channels: int, bn: float) -> nn.Sequential:
    """SSDLite's prediction layer: 3x3 depthwise, batch norm, ReLU6, then a 1x1 convolution with bias."""
    return nn.Sequential(
        _convolution(in_channels, in_channels, 3, groups=in_channels, bn=bn), nn.Conv2d(in_channels, channels, 1)
    )


def _extra(in_channels: int, channels: int, bn: float) -> nn.Sequential:
    """SSDLite's extra layer: 1x1 to half the width, 3x3 depthwise with stride 2, 1x1."""
    half = channels // 2
    return nn.Sequential(
        _convolution(in_channels, half, 1, bn=bn),
        _convolution(half, half, 3, stride=2, groups=half, bn=bn),
        _convolution(half, channels, 1, bn=bn),
    )


class SSDLiteMobileNetV2(nn.Module):
    """SSDLite on MobileNetV2: six maps (strides 16 and 32, then four of stride 2), a light box and class head on each.

    The first map is the expansion of the first block of the 160-channel row (after ReLU6, before its depthwise).

    Args:
        num_classes: outputs an anchor or pixel, background included.
        in_channels: channels of the images.
        width: multiplier of the backbone's widths.
        anchors: boxes at each position of the six maps.
        bn_momentum: share of each batch in the running statistics.

    Cost at 320 px with 81 outputs (COCO): published as 4.3 M parameters and 0.8 G MACs.

    Source: arXiv 1801.04381, section 6.2.
    """

    def __init__(
        self,
        num_classes: int = 81,
        in_channels: int = 3,
        width: float = 1.0,
        anchors: Sequence[int] = (3, 6, 6, 6, 6, 6),
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if len(anchors) != 6:
            raise UsageError(f"SSDLite anchors: {len(anchors)} numbers for six maps.")
        bn = bn_momentum
        self.num_classes = num_classes
        self.features, channels = _features(in_channels, width, "default", bn)
        # Where the resolution falls from stride 16 to 32: the last block with stride 2.
        self.tap = max(i for i, m in enumerate(self.features) if isinstance(m, InvertedResidual) and m.stride == 2)
        tapped = self._tapped().conv[0][0].out_channels  # pyright: ignore[reportIndexIssue]
        widths = [tapped, channels]
        self.extras = nn.ModuleList()
        for extra in (512, 256, 256, 128):
            self.extras.append(_extra(widths[-1], extra, bn))
            widths.append(extra)
        self.boxes = nn.ModuleList(_separable(w, 4 * a, bn) for w, a in zip(widths, anchors, strict=True))
        self.classes = nn.ModuleList(_separable(w, num_classes * a, bn) for w, a in zip(widths, anchors, strict=True))
        _initialise(self)

    def _tapped(self) -> InvertedResidual:
        block = self.features[self.tap]
        assert isinstance(block, InvertedResidual)
        return block

    def maps(self, images: Images) -> list[Tensor]:
        """Return the six feature maps, finest first."""
        x = self.features[: self.tap](images)
        expand, *rest = self._tapped().conv
        tapped = expand(x)
        x = tapped
        for layer in rest:
            x = layer(x)
        maps = [tapped, self.features[self.tap + 1 :](x)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps

    def forward(self, images: Images) -> tuple[Float[Tensor, "n anchors 4"], Float[Tensor, "n anchors classes"]]:
        """Return the box offsets and the class logits of all anchors, finest map first, row by row."""
        maps = self.maps(images)
        boxes = [_per_anchor(head(x), 4) for head, x in zip(self.boxes, maps, strict=True)]
        logits = [_per_anchor(head(x), self.num_classes) for head, x in zip(self.classes, maps, strict=True)]
        return torch.cat(boxes, 1), torch.cat(logits, 1)


def _per_anchor(x: Tensor, size: int) -> Tensor:
    """(n, anchors*size, h, w) -> (n, h*w*anchors, size)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size)


class DeepLabV3MobileNetV2(nn.Module):
    """Mobile DeepLabv3: MobileNetV2 up to its 320 channels, an image-pooling branch beside a 1x1 branch, a classifier.

    Args:
        num_classes: outputs an anchor or pixel, background included.
        in_channels: channels of the images.
        width: multiplier of the backbone's widths.
        output_stride: 16 or 8; strides past it become dilation.
        bn_momentum: share of each batch in the running statistics.

    Raises:
        UsageError: another output stride.

    Cost at 513 px, 21 classes, output stride 16: published as 2.11 M parameters and 2.75 G MACs.

    Source: arXiv 1801.04381, section 6.3.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        width: float = 1.0,
        output_stride: int = 16,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise UsageError(f"DeepLabv3 output_stride {output_stride}: 8 or 16.")
        bn = bn_momentum
        self.features, channels = _features(in_channels, width, "default", bn, last=False, output_stride=output_stride)
        self.pooled = _convolution(channels, 256, 1, bn=bn)
        self.local = _convolution(channels, 256, 1, bn=bn)
        self.project = _convolution(512, 256, 1, bn=bn)
        self.classifier = nn.Conv2d(256, num_classes, 1)
        _initialise(self)

    def forward(self, images: Images) -> Float[Tensor, "n classes h w"]:
        """Return the class logits at the resolution of the images."""
        x = self.features(images)
        pooled = self.pooled(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, x.shape[2], x.shape[3])
        x = self.classifier(self.project(torch.cat([pooled, self.local(x)], 1)))
        return F.interpolate(x, size=images.shape[-2:], mode="bilinear", align_corners=False)


@with_origin
def mobilenet_v2(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: Stem = "default",
    dropout: float = 0.2,
    bn_momentum: float = 0.1,
) -> MobileNetV2:
    """Return a MobileNetV2 classifier for images of any size; arguments as in `MobileNetV2` (arXiv 1801.04381)."""
    return MobileNetV2(num_classes, in_channels, width, stem, dropout, bn_momentum)


@with_origin
def ssdlite_mobilenet_v2(num_classes: int = 81, in_channels: int = 3, width: float = 1.0) -> SSDLiteMobileNetV2:
    """Return an SSDLite detector on MobileNetV2 for 320 px images; arguments as in `SSDLiteMobileNetV2`."""
    return SSDLiteMobileNetV2(num_classes, in_channels, width)


@with_origin
def deeplabv3_mobilenet_v2(
    num_classes: int = 21, in_channels: int = 3, width: float = 1.0, output_stride: int = 16
) -> DeepLabV3MobileNetV2:
    """Return a Mobile DeepLabv3 segmenter; arguments as in `DeepLabV3MobileNetV2`."""
    return DeepLabV3MobileNetV2(num_classes, in_channels, width, output_stride)
