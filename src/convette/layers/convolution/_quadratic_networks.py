"""The networks of quadratic convolutions that were published (Mantini and Shah 2020)."""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette.layers._networks import blocks_of, residual_stages
from convette.layers.convolution.quadratic_convolution import QuadraticConv2d, WideFormWarning


def quadratic_alexnet(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    quadratic: bool = True,
    rank: int | None = None,
    image_size: int = 32,
) -> nn.Sequential:
    """Return the paper's CIFAR "AlexNet": 31,453,354 parameters quadratic, 1,250,858 linear (10 classes, 32 px).

    Four 3x3 convolutions of 32, 32, 64, 64 filters, ELU, two poolings, dense 512. The linear one has ReLU, and as
    published no padding in its second and fourth convolution. It has no norms: train with gradients clipped at 1 (in
    the paper RMSprop, 1e-4).
    """

    def block(inside: int, outside: int, padding: int) -> list[nn.Module]:
        if not quadratic:
            return [nn.Conv2d(inside, outside, 3, padding=padding), nn.ReLU()]
        return [QuadraticConv2d(inside, outside, 3, padding=padding, rank=rank), nn.ELU()]

    side = -(-image_size // 4) if quadratic else ((image_size - 2) // 2 - 2) // 2
    last = 1 if quadratic else 0
    act = nn.ELU if quadratic else nn.ReLU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WideFormWarning)
        layers = [
            *block(in_channels, 32, 1),
            *block(32, 32, last),
            nn.MaxPool2d(2, ceil_mode=quadratic),
            nn.Dropout(0.25),
        ]
        layers += [
            *block(32, 64, 1),
            *block(64, 64, last),
            nn.MaxPool2d(2, ceil_mode=quadratic),
            nn.Dropout(0.25),
            nn.Flatten(),
        ]
    layers += [nn.Linear(64 * side * side, 512), act(), nn.Dropout(0.5), nn.Linear(512, num_classes)]
    return nn.Sequential(*layers)


class _QuadraticBlock(nn.Module):
    """Basic block of ResNet v1 with quadratic convolutions and ELU; its 1x1 shortcut is quadratic and has no norm."""

    def __init__(self, in_channels: int, channels: int, stride: int, rank: int | None) -> None:
        super().__init__()
        self.conv1 = QuadraticConv2d(in_channels, channels, 3, stride, 1, rank=rank)
        self.bn1: nn.Module = nn.BatchNorm2d(channels)
        self.conv2 = QuadraticConv2d(channels, channels, 3, 1, 1, rank=rank)
        self.bn2: nn.Module = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else QuadraticConv2d(in_channels, channels, 1, stride, rank=rank)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.bn2(self.conv2(F.elu(self.bn1(self.conv1(x)))))
        return F.elu(y + (x if self.shortcut is None else self.shortcut(x)))


class QuadraticResNet(nn.Module):
    """The paper's CIFAR ResNet v1 of quadratic convolutions: 128,030,698 parameters at depth 20 with full forms.

    Args:
        depth: 6 n + 2.
        num_classes: outputs.
        in_channels: channels of the images.
        rank: of the forms; None: full, as published.
        widths: channels of the three stages.

    Raises:
        UsageError: a depth that is not 6 n + 2.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        rank: int | None = None,
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth, 2, "QuadraticResNet")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WideFormWarning)
            self.conv1 = QuadraticConv2d(in_channels, widths[0], 3, 1, 1, rank=rank)
            self.bn1: nn.Module = nn.BatchNorm2d(widths[0])
            block = partial(_QuadraticBlock, rank=rank)
            self.layer1, self.layer2, self.layer3 = residual_stages(widths[0], widths, blocks, block)
        self.linear = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, QuadraticConv2d):
                _start_small(module)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        x = self.layer3(self.layer2(self.layer1(F.elu(self.bn1(self.conv1(images))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@torch.no_grad()
def _start_small(form: QuadraticConv2d, factor: float = 0.25) -> None:
    """Scale the outputs: squares of squares would overflow in eval mode before the norms have statistics."""
    for name, parameter in form.named_parameters():
        if name != "factors":
            parameter.mul_(factor)
