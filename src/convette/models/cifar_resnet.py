"""CIFAR ResNet: the thin residual networks for 32 px images (He et al. 2015, section 4.2), with option-A shortcuts.

Parameter names are those of akamaster/pytorch_resnet_cifar10 (`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`), so that
its published weights load strictly.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images, Logits
from convette.models._origin import with_origin

# The published weights expect the ImageNet normalisation.
NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ZeroPadShortcut(nn.Module):
    """Option-A shortcut: every second row and column, and zero channels before and after. No parameters, no MACs.

    ``y[:, before : before + c] = x[:, :, ::stride, ::stride]``, all other channels are 0.

    Args:
        before: zero channels put before those of the input.
        after: zero channels put after them.
        stride: step along rows and columns.
    """

    def __init__(self, before: int, after: int, stride: int = 2) -> None:
        super().__init__()
        self.before, self.after, self.stride = before, after, stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n padded rows columns"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class CifarBasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    Folds to two convolutions with bias.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride == 1 and in_channels == channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            before = (channels - in_channels) // 2
            self.shortcut = ZeroPadShortcut(before, channels - in_channels - before, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2: conv 3x3, three stages of n basic blocks, global average pooling, linear.

    Args:
        depth: 8, 20, 32, 44, 56, 110 or any other 6n + 2.
        num_classes: outputs.
        in_channels: channels of the images.
        widths: channels of the three stages; stages two and three halve the resolution.

    Cost at 3x32x32, 10 classes: ResNet-20 269,722 parameters and 40.55 M MACs, ResNet-56 853,018 and 125.49 M. All
    batch norms fold into their convolutions.

    Source: Deep Residual Learning for Image Recognition, He et al. 2015, arXiv 1512.03385, section 4.2; weights and
    names of Yerlan Idelbayev, Proper ResNet Implementation for CIFAR10/CIFAR100 in PyTorch, 2018.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, widths: tuple[int, int, int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth}: a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 26, 32, ...).")
        blocks = (depth - 2) // 6
        self.depth = depth
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Images) -> Logits:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBasicBlock(channels, channels) for _ in range(blocks - 1)))


@with_origin
def resnet8(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-8, one block a stage: 75,290 parameters at 3x32x32 with 10 classes; for small experiments."""
    return CifarResNet(8, num_classes, in_channels)


@with_origin
def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-20: 269,722 parameters, 40,551,040 MACs at 3x32x32 with 10 classes (arXiv 1512.03385)."""
    return CifarResNet(20, num_classes, in_channels)


@with_origin
def resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-32: 464,154 parameters at 3x32x32 with 10 classes (arXiv 1512.03385)."""
    return CifarResNet(32, num_classes, in_channels)


@with_origin
def resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-44: 658,586 parameters at 3x32x32 with 10 classes (arXiv 1512.03385)."""
    return CifarResNet(44, num_classes, in_channels)


@with_origin
def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-56: 853,018 parameters at 3x32x32 with 10 classes (arXiv 1512.03385)."""
    return CifarResNet(56, num_classes, in_channels)


@with_origin
def resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return CIFAR ResNet-110: 1,727,962 parameters at 3x32x32 with 10 classes (arXiv 1512.03385)."""
    return CifarResNet(110, num_classes, in_channels)
