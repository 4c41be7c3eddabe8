"""Binary networks: NIN as XNOR-Net trains it, VGG-11, Bi-Real ResNet-18 and 34; and their real twins.

Sources: M. Rastegari and others, XNOR-Net, arXiv 1603.05279; Z. Liu and others, Bi-Real Net, arXiv 1808.00278. The
layers are in `convette.layers.quantization` (`BinaryConv2d`, `SignActivation`).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images, Logits
from convette.errors import UsageError
from convette.layers.quantization.binary_networks import BinaryConv2d
from convette.models._origin import with_origin

Kind = Literal["binary", "real"]
Stem = Literal["default", "small"]
Surrogate = Literal["approx", "ste"]
# Depth -> single-convolution blocks of each stage.
BIREAL_BLOCKS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}


def _convolution(a: int, b: int, kernel: int, stride: int, padding: int, kind: str, **given: str | bool) -> nn.Conv2d:
    if kind == "real":
        return nn.Conv2d(a, b, kernel, stride, padding, bias=bool(given.get("bias", False)))
    return BinaryConv2d(a, b, kernel, stride, padding, **given)  # type: ignore[arg-type]


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width / 8) * 8)


class XnorBlock(nn.Module):
    """XNOR-Net's order: ``relu(conv(sgn(dropout(bn(x)))))``; the batch norm centres what is rounded.

    Real twin: the same without the sign. Dropout comes before the sign, so that the signs stay signs.
    """

    def __init__(self, a: int, b: int, kernel: int, padding: int, dropout: float, kind: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(a, eps=1e-4)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        given: dict[str, str | bool] = {} if kind == "real" else {"surrogate": "ste", "weight_gradient": "xnor"}
        self.conv = _convolution(a, b, kernel, 1, padding, kind, bias=True, **given)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        return F.relu(self.conv(self.dropout(self.bn(x))))


class BinaryNIN(nn.Module):
    """Network in network for 32 px images, binary but for its first and last convolution (XNOR-Net's for CIFAR-10).

    949,248 binary weights and 20,170 real parameters with 3 channels and 10 classes. Global average pooling in the
    place of an 8x8 one: the same at 32 px, and any size from 4 px goes.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, kind: str = "binary", width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3 = (_scaled(channels, width) for channels in (192, 160, 96))
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, c1, 5, padding=2), nn.BatchNorm2d(c1, eps=1e-4, affine=False), nn.ReLU()
        )
        self.stage1 = nn.Sequential(XnorBlock(c1, c2, 1, 0, 0.0, kind), XnorBlock(c2, c3, 1, 0, 0.0, kind))
        self.pool1 = nn.MaxPool2d(3, 2, 1)
        self.stage2 = nn.Sequential(
            XnorBlock(c3, c1, 5, 2, 0.5, kind), XnorBlock(c1, c1, 1, 0, 0.0, kind), XnorBlock(c1, c1, 1, 0, 0.0, kind)
        )
        self.pool2 = nn.AvgPool2d(3, 2, 1)
        self.stage3 = nn.Sequential(XnorBlock(c1, c1, 3, 1, 0.5, kind), XnorBlock(c1, c1, 1, 0, 0.0, kind))
        self.bn = nn.BatchNorm2d(c1, eps=1e-4, affine=False)
        self.classifier = nn.Conv2d(c1, num_classes, 1)

    def forward(self, images: Images) -> Logits:
        x = self.pool1(self.stage1(self.stem(images)))
        x = self.stage3(self.pool2(self.stage2(x)))
        return F.relu(self.classifier(self.bn(x))).mean((2, 3))


class BinaryVGG(nn.Module):
    """VGG-11 for small images, bias-free: first convolution and classifier real, the others ``bn(conv(sgn(x)))``.

    Pools come before signs (after them almost everything would be +1). 9,228,362 parameters with 10 classes. The real
    twin has ReLUs.
    """

    LAYERS = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")

    def __init__(self, num_classes: int = 10, in_channels: int = 3, kind: str = "binary", width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for item in self.LAYERS:
            if isinstance(item, str):
                # Rounded up, so that small images go through all five; the same at 32 px.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            out = _scaled(item, width)
            first = channels == in_channels and not layers
            layers.append(_convolution(channels, out, 3, 1, 1, "real" if first else kind))
            layers.append(nn.BatchNorm2d(out))
            if kind == "real":
                layers.append(nn.ReLU())
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Images) -> Logits:
        return self.classifier(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))


class BiRealBlock(nn.Module):
    """One convolution and a shortcut around it: ``bn(conv(sgn(x))) + shortcut(x)``; the real stream goes on.

    Where it strides, the shortcut is average pooling, a real 1x1 convolution and a batch norm. The real twin is
    ``bn(conv(relu(x))) + shortcut(x)``.
    """

    def __init__(self, a: int, b: int, stride: int, kind: str, surrogate: str) -> None:
        super().__init__()
        self.relu = nn.ReLU() if kind == "real" else nn.Identity()
        given: dict[str, str | bool] = {} if kind == "real" else {"surrogate": surrogate}
        self.conv = _convolution(a, b, 3, stride, 1, kind, **given)
        self.bn = nn.BatchNorm2d(b)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or a != b:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        return self.bn(self.conv(self.relu(x))) + self.shortcut(x)


class BiRealNet(nn.Module):
    """ResNet with a shortcut around every binary 3x3 convolution; stem, 1x1 convolutions and classifier are real.

    Bi-Real-18 with 1000 classes: 10,985,472 binary weights and 704,040 real parameters. `stem` "small": 3x3 convolution
    of stride 1 and no pooling, for images of about 32 px.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        stem: str = "default",
        kind: str = "binary",
        width: float = 1.0,
        surrogate: str = "approx",
    ) -> None:
        super().__init__()
        widths = [_scaled(channels, width) for channels in (64, 128, 256, 512)]
        if stem == "small":
            first: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)]
        else:
            first = [nn.Conv2d(in_channels, widths[0], 7, 2, 3, bias=False)]
        self.stem = nn.Sequential(*first, nn.BatchNorm2d(widths[0]))
        self.pool = nn.Identity() if stem == "small" else nn.MaxPool2d(3, 2, 1)
        stages, channels = [], widths[0]
        for number, (count, out) in enumerate(zip(blocks, widths, strict=True)):
            parts = []
            for index in range(count):
                parts.append(BiRealBlock(channels, out, 2 if number and not index else 1, kind, surrogate))
                channels = out
            stages.append(nn.Sequential(*parts))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Images) -> Logits:
        x = self.stages(self.pool(self.stem(images)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@with_origin
def binary_nin(num_classes: int = 10, in_channels: int = 3, kind: Kind = "binary", width: float = 1.0) -> BinaryNIN:
    """Return the binary NIN of XNOR-Net (arXiv 1603.05279): 949,248 binary weights, 20,170 real parameters."""
    return BinaryNIN(num_classes, in_channels, kind, width)


@with_origin
def binary_vgg11(num_classes: int = 10, in_channels: int = 3, kind: Kind = "binary", width: float = 1.0) -> BinaryVGG:
    """Return the binary VGG-11 for small images: 9,228,362 parameters, all but 12,362 of its weights binary."""
    return BinaryVGG(num_classes, in_channels, kind, width)


@with_origin
def birealnet(
    num_classes: int = 10,
    in_channels: int = 3,
    depth: int = 18,
    stem: Stem = "default",
    kind: Kind = "binary",
    width: float = 1.0,
    surrogate: Surrogate = "approx",
) -> BiRealNet:
    """Return the Bi-Real network (arXiv 1808.00278) of depth 18 or 34.

    With 1000 classes: 10,985,472 binary weights and 704,040 real parameters; 21,086,208 and 711,464. Raises
    `UsageError` for another depth.
    """
    if depth not in BIREAL_BLOCKS:
        raise UsageError(f"birealnet: no network of depth {depth}; {' and '.join(map(str, BIREAL_BLOCKS))} can be.")
    return BiRealNet(BIREAL_BLOCKS[depth], num_classes, in_channels, stem, kind, width, surrogate)
