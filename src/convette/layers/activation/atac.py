"""ATAC: attention over channels, at every position alone, in the place of an activation (Dai et al. 2020)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_batch, check_maps
from convette.layers._folding import Stays
from convette.layers._stages import stages

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.CELU),
)


class ATAC(nn.Module):
    r"""An activation that gates every value by what a bottleneck sees of all channels at its position.

    .. math:: y = x \cdot \sigma(g(x)), \quad g = BN_2(W_2\, \mathrm{relu}(BN_1(W_1 x)))

    W1 takes c channels to c / r at each position, W2 back. ReLU is the gate 1[x > 0]; this one is learned and looks
    across channels. Gates are near 1/2 to begin with, so that the variance falls to about a quarter: it wants a
    normalised layer behind it. Not behind the addition of a v1 residual block, where the trunk would be halved again
    and again.

    Args:
        channels: c of an input (n, c, h, w).
        r: reduction; the bottleneck has max(1, c // r) channels.
        use_global: pool over positions first, one gate a channel (an SE-like ablation of the paper).
        use_relu: the ReLU within the bottleneck (False: the other ablation).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: an input of another shape; in training, fewer than two values a channel.

    Cost: 2 c m + 2 m + 2 c parameters and 2 c m h w MACs, m = c // r (at r = 2 a ninth of a 3x3 convolution);
    keeps three maps for the backward pass. Folding: both batch norms go into their convolutions, exactly
    (`convette.fold`); the gate depends on the input and stays.

    Source: Attention as Activation, Dai et al. 2020, arXiv 2007.07729.
    """

    def __init__(
        self,
        channels: int,
        r: int = 2,
        *,
        use_global: bool = False,
        use_relu: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if channels < 1 or r < 1:
            raise UsageError(f"ATAC: channels {channels} and r {r} must be at least 1.")
        middle = max(1, channels // r)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.use_global, self.use_relu = use_global, use_relu
        self.reduce = nn.Conv2d(channels, middle, 1, bias=False, **where)
        self.norm1: nn.Module = nn.BatchNorm2d(middle, **where)
        self.expand = nn.Conv2d(middle, channels, 1, bias=False, **where)
        self.norm2: nn.Module = nn.BatchNorm2d(channels, **where)
        nn.init.kaiming_normal_(self.reduce.weight)
        nn.init.kaiming_normal_(self.expand.weight)

    @property
    def channels(self) -> int:
        """Channels of the input; read off the weights, so that it follows when channels are removed."""
        return self.reduce.weight.shape[1]

    def gate(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c rows columns"]:
        """Return the gates, 0 .. 1, (n, c, h, w) or (n, c, 1, 1) with `use_global`."""
        g = F.adaptive_avg_pool2d(x, 1) if self.use_global else x
        g = self.norm1(self.reduce(g))
        return torch.sigmoid(self.norm2(self.expand(F.relu(g) if self.use_relu else g)))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.channels, "ATAC")
        check_batch(x[:, :, :1, :1] if self.use_global else x, "ATAC", self.training)
        return x * self.gate(x)

    def folded(self) -> nn.Module:
        """Raises `Stays`: the gate depends on the input."""
        raise Stays(
            "ATAC: its gate depends on the input, so it is no plain layer; its norms fold into their convolutions."
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, middle={self.reduce.weight.shape[0]}, use_global={self.use_global}"


class ATACBottleneck(nn.Module):
    """torchvision's bottleneck block with ATAC behind its first two norms; behind the addition stays ReLU.

    Layers it shares with `torchvision.models.resnet.Bottleneck` have the same names, so that weights carry over.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        projects: bool = False,
        r: int = 2,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = ATAC(width, r)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = ATAC(width, r)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride) if projects else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ATACBasicBlock(nn.Module):
    """The basic block of torchvision and of the CIFAR ResNets with ATAC behind its first norm; see `ATACBottleneck`."""

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, projects: bool = False, pad: int = 0, r: int = 2
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = ATAC(channels, r)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride) if projects else None
        # Zero channels before and after those of the input: the CIFAR ResNets' shortcut without parameters.
        self.before = pad
        self.after = channels - in_channels - pad if pad else 0
        self.stride = stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.before or self.after:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return F.relu(y + x)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def replace_activation(
    model: nn.Module,
    example: Any = None,
    stage_count: int | None = 2,
    *,
    r: int = 2,
    keep_post_add: bool = True,
    use_global: bool = False,
) -> nn.Module:
    """Put `ATAC` in the place of activations of the last stages of `model`, in place and logged as edits.

    In ResNets v1 those within the blocks are replaced, those behind an addition stay (the paper's ResNet-50). Blocks
    of torchvision and of the CIFAR ResNets, which use one ReLU in several places, become `ATACBottleneck` or
    `ATACBasicBlock` with the same weights; elsewhere (timm, MobileNetV2 ...) the activations are modules of their own
    and are converted one by one.

    Args:
        model: any network of convette, timm or torchvision.
        example: an input, run once; needed where activations are modules, to see channels and additions.
        stage_count: how many stages from the end; 2 is the paper's for ImageNet, None: the whole network with stem.
        r: reduction of `ATAC`.
        keep_post_add: leave activations alone that read a sum.
        use_global: see `ATAC`; blocks that would have to be rebuilt are refused with it.

    Activations inside squeeze-and-excitation are left alone.

    Raises:
        UsageError: nothing to replace, or an example is missing.
    """
    from convette.surgery import apply

    inside = _inside(model, stage_count)
    blocks = {} if use_global else _rebuilt(model, inside, r)
    edits = list(blocks.values())
    if not all(_in(name, blocks) for name in _weighty(model, inside)):
        edits += _converted(model, example, [*inside], [*blocks], r, keep_post_add, use_global)
    if not edits:
        raise UsageError(f"replace_activation: {type(model).__name__} has no activation to replace in {inside or '.'}.")
    apply(model, *edits)
    return model


def _inside(model: nn.Module, stage_count: int | None) -> tuple[str, ...]:
    """Return the names of the modules whose activations are meant; "" is everything."""
    if stage_count is None:
        return ("",)
    if stage_count < 1:
        raise UsageError(f"replace_activation: stage_count {stage_count} must be at least 1.")
    return tuple(name for stage in stages(model)[-stage_count:] for name in stage.modules)


def _in(name: str, parents: Any) -> bool:
    return any(not parent or name == parent or name.startswith(f"{parent}.") for parent in parents)


def _weighty(model: nn.Module, inside: Sequence[str]) -> list[str]:
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in convolutions if _in(name, inside)]


def _rebuilt(model: nn.Module, inside: Sequence[str], r: int) -> dict[str, Any]:
    """Return the edits that rebuild the blocks among `inside` whose ReLU is shared or a function."""
    from convette.surgery import Convert

    edits: dict[str, Any] = {}
    for name, block in model.named_modules():
        kind, home = type(block).__name__, type(block).__module__
        if not _in(name, inside):
            continue
        if home == "torchvision.models.resnet" and kind in ("Bottleneck", "BasicBlock"):
            conv1: Any = block.conv1
            last: Any = block.conv3 if kind == "Bottleneck" else block.conv2
            middle: Any = block.conv2
            arguments = {"in_channels": conv1.in_channels, "stride": block.stride, "r": r}
            arguments["projects"] = block.downsample is not None
            if kind == "Bottleneck":
                arguments |= {"width": conv1.out_channels, "out_channels": last.out_channels}
                arguments |= {"dilation": middle.dilation[0], "groups": middle.groups}
            else:
                arguments["channels"] = conv1.out_channels
            edits[name] = Convert(name, f"{__name__}:ATAC{kind}", arguments)
        elif kind == "CifarBasicBlock":
            conv1, shortcut = block.conv1, block.shortcut
            arguments = {"in_channels": conv1.in_channels, "channels": conv1.out_channels, "r": r}
            arguments |= {"stride": conv1.stride[0], "pad": getattr(shortcut, "before", 0)}
            edits[name] = Convert(name, f"{__name__}:ATACBasicBlock", arguments)
    return edits


def _converted(
    model: nn.Module,
    example: Any,
    inside: Sequence[str],
    done: Sequence[str],
    r: int,
    keep_post_add: bool,
    use_global: bool,
) -> list[Any]:
    """Return the edits for activations that are modules of their own, each run once."""
    from convette.surgery import Convert
    from convette.surgery._dataflow import dataflow

    if example is None:
        raise UsageError("replace_activation: give an example input: channels and additions are found by running it.")
    nodes = dataflow(model, example)
    edits, seen = [], set()
    modules = dict(model.named_modules())
    for node in nodes:
        name, module = node.module, modules.get(node.module)
        if not isinstance(module, _ACTIVATIONS) or not _in(name, inside) or _in(name, done) or len(node.shape) != 4:
            continue
        if name in seen:
            raise UsageError(f"replace_activation: {name!r} is used in several places; build the block with its own.")
        seen.add(name)
        after_sum = any(source >= 0 and nodes[source].name in _SUMS for source in node.sources)
        holder = type(modules[name.rpartition(".")[0]]).__name__.lower()
        if (keep_post_add and after_sum) or "squeeze" in holder:
            continue
        arguments = {"channels": node.shape[1], "r": r, "use_global": use_global}
        edits.append(Convert(name, f"{__name__}:ATAC", arguments, keep_activation=False))
    return edits


_SUMS = ("add", "__add__", "__radd__", "__iadd__")


class _PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, act1: nn.Module, act2: nn.Module) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = act1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = act2
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.conv2(self.act2(self.bn2(self.conv1(self.act1(self.bn1(x))))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ATACResNet(nn.Module):
    """The paper's CIFAR network: a pre-activation ResNet whose activations are ATAC.

    A batch norm of the images without scale, a 3x3 convolution, three stages of 16, 32, 64 channels and `blocks`
    blocks, a norm, an activation, global average pooling, linear.

    Args:
        blocks: of a stage; 1, 2, 3, 5 in the paper (3: the depth of ResNet-20).
        num_classes: outputs.
        in_channels: channels of the images.
        act_layers: how many of the four places use ATAC, from the back: final, stage 3, 2, 1; the rest ReLU.
        r: reduction.
        width: factor on the channels; for networks of equal size without ATAC.
        use_global: see `ATAC`.

    Raises:
        UsageError: act_layers outside 0 .. 4, or no block.

    Cost at 10 classes: 89,578 parameters with one block a stage (77,850 with ReLU), 306,858 with three (272,282).

    Source: Attention as Activation, Dai et al. 2020, arXiv 2007.07729.
    """

    def __init__(
        self,
        blocks: int = 3,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        act_layers: int = 4,
        r: int = 2,
        width: float = 1.0,
        use_global: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= act_layers <= 4 or blocks < 1:
            raise UsageError(f"ATACResNet: act_layers {act_layers} must be 0 to 4 and blocks {blocks} at least 1.")

        def act(channels: int, place: int) -> nn.Module:
            # Places from the back: 0 the final one, then stage 3, 2, 1.
            return ATAC(channels, r, use_global=use_global) if act_layers > place else nn.ReLU()

        widths = [max(1, round(width * base)) for base in (16, 32, 64)]
        self.data_norm = nn.BatchNorm2d(in_channels, affine=False)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        channels, made = widths[0], []
        for stage, wide in enumerate(widths):
            layers = []
            for index in range(blocks):
                stride = 2 if stage and index == 0 else 1
                acts = act(channels, 3 - stage), act(wide, 3 - stage)
                layers.append(_PreActivationBlock(channels, wide, stride, *acts))
                channels = wide
            made.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = made
        self.bn = nn.BatchNorm2d(channels)
        self.act = act(channels, 0)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        x = self.conv1(self.data_norm(images))
        x = self.act(self.bn(self.layer3(self.layer2(self.layer1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
