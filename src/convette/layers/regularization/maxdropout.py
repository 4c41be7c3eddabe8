"""MaxDropout: the most active units are dropped, not random ones (Santos et al. 2020)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._folding import Stays
from convette.layers._networks import blocks_of, residual_stages
from convette.layers._stages import stages

Scope = Literal["tensor", "sample", "channel"]
Rate = Literal["fixed", "uniform"]


def drop_mask(x: Float[Tensor, "*shape"], p: float | Tensor = 0.3, scope: Scope = "tensor") -> Bool[Tensor, "*shape"]:
    r"""Return which entries MaxDropout drops: those with :math:`(x - \min x) / (\max x - \min x) > 1 - p`.

    Least and largest value are of the whole tensor, of every sample or of every channel of one. Where they are equal
    nothing is dropped; neither are values that are not numbers. For x >= 0 with a zero in it this is x > (1 - p) max x.
    Its mean is the share that is dropped, which is not p: about 3e-4 of rectified Gaussian values at p = 0.3.
    """
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    first = {"tensor": 0, "sample": 1, "channel": 2}[scope]
    if x.ndim <= first:
        raise UsageError(f"MaxDropout: scope {scope!r} has nothing to compare in an input {tuple(x.shape)}.")
    full = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    axes = tuple(range(first, x.ndim))
    least, most = full.amin(axes, keepdim=True), full.amax(axes, keepdim=True)
    return full - least > (1 - p) * (most - least)


def max_dropout(
    x: Float[Tensor, "*shape"], p: float | Tensor = 0.3, scope: Scope = "tensor"
) -> Float[Tensor, "*shape"]:
    """Return `x` with the entries of `drop_mask` set to 0, not rescaled; gradients 0 there, 1 elsewhere."""
    return x.masked_fill(drop_mask(x, p, scope), 0)


class MaxDropout(nn.Module):
    r"""Set the strongest responses to 0 in training, so that the network must do with the less prominent ones.

    .. math:: y = x \cdot [\hat x \le 1 - p], \quad \hat x = (x - \min x) / (\max x - \min x)

    Nothing is drawn at random (with ``rate="fixed"``) and nothing rescaled. Meant for rectified inputs of any shape,
    in the place of dropout (`replace_dropout`) or behind stages (`insert_after_stages`).

    Args:
        p: part of the range that is cut off at the top, 0 .. 1; the share of entries dropped is far smaller
            (`drop_mask`).
        scope: where least and largest value are taken: "tensor" (the authors': one outlier sets the threshold of the
            whole batch, and larger batches drop less), "sample" (small batches, several devices), "channel".
        rate: "fixed", or "uniform": drawn from U(0, p) at every call.
        active_in_eval: drop in eval mode too. The published code builds a new module at every call, which is always
            in training mode, so its networks drop at test time as well; this reproduces that.

    Raises:
        UsageError: p outside 0 .. 1, an unknown scope or rate, a scope with nothing to compare.

    Cost: two reductions and a comparison in training; nothing at inference, where it folds to `nn.Identity`.

    Source: MaxDropout: Deep Neural Network Regularization Based on Maximum Output Values, Santos et al. 2020,
    arXiv 2007.13723.
    """

    def __init__(
        self, p: float = 0.3, scope: Scope = "tensor", *, rate: Rate = "fixed", active_in_eval: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UsageError(f"MaxDropout: p = {p} must be from 0 to 1.")
        for name, value, known in (("scope", scope, get_args(Scope)), ("rate", rate, get_args(Rate))):
            if value not in known:
                raise UsageError(f"MaxDropout: {name} {value!r} is none of {', '.join(known)}.")
        self.p, self.rate, self.active_in_eval = p, rate, active_in_eval
        self.scope: Scope = scope

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not (self.training or self.active_in_eval):
            return x
        p = self.p * torch.rand((), device=x.device) if self.rate == "uniform" else self.p
        return max_dropout(x, p, self.scope)

    def folded(self) -> nn.Module:
        """Return `nn.Identity`; raises `Stays` where it drops in eval mode too."""
        if self.active_in_eval:
            raise Stays("MaxDropout with active_in_eval drops at inference: what it drops depends on the input.")
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"p={self.p}, scope={self.scope!r}, rate={self.rate!r}"


def insert_after_stages(
    model: nn.Module, p: float = 0.3, scope: Scope = "tensor", *, rate: Rate = "fixed", active_in_eval: bool = False
) -> nn.Module:
    """Put a `MaxDropout` behind every stage of `model` (the paper's place in ResNet-18), in place and logged.

    Arguments as of `MaxDropout`. Returns the network. Raises `UsageError` where no stages are found.
    """
    from convette.surgery import Append, apply

    arguments = {"p": p, "scope": scope, "rate": rate, "active_in_eval": active_in_eval}
    MaxDropout(p, scope, rate=rate)  # refuses what cannot be before anything changes
    apply(model, *(Append(stage.end, f"{__name__}:MaxDropout", arguments) for stage in stages(model)))
    return model


def replace_dropout(
    model: nn.Module, p: float = 0.3, scope: Scope = "tensor", *, rate: Rate = "fixed", active_in_eval: bool = False
) -> nn.Module:
    """Put a `MaxDropout` in the place of every dropout layer of `model`, in place and logged; returns the network.

    Arguments as of `MaxDropout`. Dropout that is a function or an argument of attention is not seen. Raises
    `StructureError` where there is no dropout layer.
    """
    from convette.surgery import Replacement, convert

    MaxDropout(p, scope, rate=rate)
    arguments = {"p": p, "scope": scope, "rate": rate, "active_in_eval": active_in_eval}
    convert(model, {nn.modules.dropout._DropoutNd: Replacement(MaxDropout, arguments)})
    return model


class _WideBlock(nn.Module):
    """Pre-activation block of a Wide ResNet with dropout between its convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: nn.Module) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = dropout
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        active = F.relu(self.bn1(x))
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Wide ResNet with MaxDropout (or dropout, or nothing) between the convolutions of every block.

    Args:
        depth: 6 n + 4, such as 28 or 16 (four convolutions besides n blocks in each of three stages).
        width: factor on 16, 32, 64 channels; the paper's are 28-10 (CIFAR) and 16-4 (SVHN).
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: "max", "random" or "none".
        p: of the dropout.

    Raises:
        UsageError: a depth that is not 6 n + 4, or an unknown dropout.

    Cost: WRN-28-10 has 36,479,194 parameters for 10 classes, WRN-16-4 2,748,890.

    Source: Wide Residual Networks, Zagoruyko and Komodakis 2016, arXiv 1605.07146; with MaxDropout, arXiv 2007.13723.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        dropout: Literal["max", "random", "none"] = "max",
        p: float = 0.3,
    ) -> None:
        super().__init__()
        blocks = blocks_of(depth, 4, "WideResNet")
        kinds = {"max": MaxDropout, "random": nn.Dropout, "none": lambda p: nn.Identity()}
        if dropout not in kinds:
            raise UsageError(f"WideResNet: dropout {dropout!r} is none of {', '.join(kinds)}.")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        widths = [width * base for base in (16, 32, 64)]

        def block(in_channels: int, channels: int, stride: int) -> nn.Module:
            return _WideBlock(in_channels, channels, stride, kinds[dropout](p))

        self.layer1, self.layer2, self.layer3 = residual_stages(16, widths, blocks, block)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))
