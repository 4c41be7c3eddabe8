"""Whole networks of the ball: the Poincaré ResNet, and others made hyperbolic."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._modules import replace_modules
from convette.layers._networks import blocks_of, residual_stages
from convette.layers.hyperbolic.poincare_resnet import (
    PoincareAdd,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareLinear,
)


class PoincareBlock(nn.Module):
    """conv - norm - ReLU - conv - norm, Möbius sum with the shortcut, ReLU; all on one ball.

    The shortcut is a hyperbolic 1x1 convolution where the shape changes. Tangents in, tangents out.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        c: float = 0.1,
        init: str = "dirac",
        order: str = "fr",
    ) -> None:
        super().__init__()
        self.conv1 = PoincareConv2d(in_channels, channels, 3, stride, 1, c=c, init=init)
        self.norm1 = PoincareBatchNorm2d(channels, c=c)
        self.conv2 = PoincareConv2d(channels, channels, 3, 1, 1, c=c, init=init)
        self.norm2 = PoincareBatchNorm2d(channels, c=c)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else PoincareConv2d(in_channels, channels, 1, stride, c=c, init=init)
        self.add = PoincareAdd(c, order)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.add(self.norm2(self.conv2(y)), self.shortcut(x)))


class PoincareResNet(nn.Module):
    """Poincaré ResNet of depth 6n + 2: stem, three groups of n blocks, mean of the tangents, hyperbolic logits.

    Args:
        depth: 8, 14, 20, 26, 32 ...
        widths: channels of the three groups; the second and third halve the resolution.
        num_classes: outputs.
        in_channels: channels of the images, which are read as tangents (normalise them to about -1..1).
        c: minus the curvature, fixed.
        init: see `PoincareConv2d`.
        order: of the shortcuts' sums, see `PoincareAdd`.

    Raises:
        UsageError: another depth.

    Parameters, 3 channels, 10 classes: 8-16-32 68,757 at depth 20 and 117,601 at 32; 16-32-64 272,397; 4-8-16 17,529.
    All parameters are Euclidean (tangents, offsets), so that plain Adam is Riemannian Adam: 1e-3, weight decay 1e-4,
    batch 128. Source: van Spengler et al. 2023, arXiv 2303.14027.
    """

    def __init__(
        self,
        depth: int = 20,
        widths: tuple[int, int, int] = (8, 16, 32),
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        c: float = 0.1,
        init: str = "dirac",
        order: str = "fr",
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth, 2, "PoincareResNet")
        self.conv1 = PoincareConv2d(in_channels, widths[0], 3, 1, 1, c=c, init=init)
        self.norm1 = PoincareBatchNorm2d(widths[0], c=c)
        block = partial(PoincareBlock, c=c, init=init, order=order)
        self.layer1, self.layer2, self.layer3 = residual_stages(widths[0], widths, blocks, block)
        self.linear = PoincareLinear(widths[-1], num_classes, c=c, init=init)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        x = functional.relu(self.norm1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def poincare_resnet(
    depth: int = 20,
    widths: tuple[int, int, int] = (8, 16, 32),
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    c: float = 0.1,
    init: str = "dirac",
) -> PoincareResNet:
    """Return a Poincaré ResNet (arXiv 2303.14027); see `PoincareResNet`."""
    return PoincareResNet(depth, widths, num_classes, in_channels, c=c, init=init)


def to_poincare(model: nn.Module, c: float = 0.1, init: str = "dirac", *, keep: bool = False) -> nn.Module:
    """Replace the convolutions, batch norms and linear layers of `model` by those of the ball; in place, returns it.

    Grouped and dilated convolutions stay, and so do the sums of shortcuts, which add tangents (the first order of
    Möbius addition): a network of the ball throughout is `poincare_resnet`. With `keep` the weights are taken over in
    their flat limit. Raises `UsageError` where there is nothing to replace.
    """
    done: list[str] = []

    def form(name: str, module: nn.Module) -> nn.Module | None:
        new: nn.Module
        if type(module) is nn.Conv2d and module.groups == 1 and module.dilation == (1, 1):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                return None
            size: Any = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            new = PoincareConv2d(*size, bias=module.bias is not None, c=c, init=init)
        elif type(module) is nn.BatchNorm2d:
            new = PoincareBatchNorm2d(module.num_features, c=c)
        elif type(module) is nn.Linear:
            new = PoincareLinear(module.in_features, module.out_features, module.bias is not None, c=c, init=init)
        else:
            return None
        done.append(name)
        weight = next(module.parameters(), None)
        new = new if weight is None else new.to(device=weight.device, dtype=weight.dtype)
        if keep and isinstance(new, PoincareConv2d | PoincareLinear):
            new.take_over(module)
        return new.train(module.training)

    result = replace_modules(model, form)
    if not done:
        raise UsageError(f"to_poincare: {type(model).__name__} has no layer of one group to replace.")
    return result
