"""LightNL: a non-local block without softmax and transforms, cheap enough for mobile networks (Li et al. 2020)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers.attention._placing import attach

Order = Literal["auto", "affinity", "moments"]


class LightNonLocal2d(nn.Module):
    r"""Add to every position a sum over all others, weighted by how alike they are, through a depthwise convolution.

    .. math:: y = x + BN(D * f), \quad f_{jp} = \frac1n \sum_q \Big( \sum_{i<c'} x_{ip} x_{iq} \Big) x_{jq}

    p runs over the n = h w positions, q over every `stride`-th row and column, i over the first c' = ratio c channels;
    D is a depthwise 3x3 convolution. Without a softmax the product can be taken in either order: affinities first
    (n x n') or moments first (c x c'), whichever is fewer multiplications for the size at hand. The batch norm's scale
    starts at 0, so that the layer starts as the identity. It belongs behind the norm of a linear projection
    (inverted residuals) or the last norm of a branch, before the addition (`insert_nonlocal`); an activation before
    it would take its negative correlations away.

    Args:
        channels: c of an input (n, c, h, w).
        ratio: part of the channels that are compared, above 0 up to 1; at least one.
        stride: of the positions that are summed over, 1 or 2; an odd size rounds up.
        order: "auto", "affinity" or "moments". Exported with dynamic sizes, "moments" holds no (h w)² map.
        zero_init: start the scale of the batch norm at 0; False: at 1.
        port_scale: divide by h and multiply by w, as a PyTorch port of the authors' code does by mistake; for its
            weights only.
        eps: of the batch norm.
        momentum: weight of a batch in its running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: ratio, stride or order out of range, an input of another shape, fewer than two values a channel
            in training.

    Cost: 11 c parameters and 9 c n MACs plus the smaller of n n' (c + c') and (n + n') c c'. The products are taken in
    float32 for half precision: values are cubic in the input. Folding: the batch norm goes into the depthwise
    convolution (`convette.fold`); the products stay.

    Source: Neural Architecture Search for Lightweight Non-Local Networks, Li et al. 2020, arXiv 2004.01961.
    """

    def __init__(
        self,
        channels: int,
        ratio: float = 0.25,
        stride: int = 1,
        *,
        order: Order = "auto",
        zero_init: bool = True,
        port_scale: bool = False,
        eps: float = 1e-3,
        momentum: float = 0.01,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1 or stride < 1 or channels < 1:
            raise UsageError(
                f"LightNonLocal2d: ratio {ratio} must be above 0 and at most 1, stride {stride} and channels {channels}"
                " at least 1; for no block leave the layer out."
            )
        if order not in ("auto", "affinity", "moments"):
            raise UsageError(f"LightNonLocal2d: order {order!r} is none of 'auto', 'affinity', 'moments'.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ratio, self.stride, self.order, self.port_scale = ratio, stride, order, port_scale
        self.compared = max(1, int(ratio * channels))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, **where)
        self.norm: nn.Module = nn.BatchNorm2d(channels, eps, momentum, **where)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / 9))
        if zero_init:
            nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """Channels of the input; read off the weights, so that it follows when channels are removed."""
        return self.conv.weight.shape[0]

    def product(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return f, before the depthwise convolution; float32 for half precision."""
        with torch.autocast(x.device.type, enabled=False):
            full = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            sampled = full[:, :, :: self.stride, :: self.stride].flatten(2)
            theta, phi = full[:, : self.compared].flatten(2), sampled[:, : self.compared].transpose(1, 2)
            # Both orders are two products of three matrices: g (phi theta) or (g phi) theta.
            if self._affinity_first(x, theta.shape[1]):
                f = torch.matmul(sampled, torch.matmul(phi, theta))
            else:
                f = torch.matmul(torch.matmul(sampled, phi), theta)
            height, width = x.shape[2:]
            return f.view_as(full) * (width / height if self.port_scale else 1 / max(1, height * width))

    def _affinity_first(self, x: Tensor, compared: int) -> bool:
        if self.order != "auto":
            return self.order == "affinity"
        first, second = orders_macs(x.shape[1], compared, x.shape[2], x.shape[3], self.stride)
        return bool(first <= second)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.channels, "LightNonLocal2d", self.training)
        return (x + self.norm(self.conv(self.product(x).to(x.dtype)))).to(x.dtype)

    def folded(self) -> nn.Module:
        """Raises `Stays`: the products depend on the input."""
        raise Stays(
            "LightNonLocal2d: a product of its input with itself is no plain layer; its norm goes into its convolution."
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, compared={self.compared}, stride={self.stride}, order={self.order!r}"


def orders_macs(channels: int, compared: int, height: int, width: int, stride: int = 1) -> tuple[int, int]:
    """Return the MACs of both products, affinities first and moments first."""
    n, sampled = height * width, -(-height // stride) * -(-width // stride)
    return n * sampled * (channels + compared), (n + sampled) * compared * channels


def nonlocal_macs(channels: int, height: int, width: int, ratio: float = 0.25, stride: int = 1) -> int:
    """Return the MACs of the layer as its authors count them: the cheaper order and the depthwise convolution."""
    compared = max(1, int(ratio * channels))
    return min(orders_macs(channels, compared, height, width, stride)) + 9 * channels * height * width


def insert_nonlocal(
    model: nn.Module,
    example: Any = None,
    at: Sequence[str] | Literal["block", "stage"] = "block",
    ratio: float = 0.25,
    stride: int = 1,
) -> nn.Module:
    """Insert `LightNonLocal2d` into `model`, in place and logged as edits; at first it computes what it did.

    Args:
        model: any network of convette, timm or torchvision.
        example: an input, run once to see how many channels there are.
        at: names of modules to stand behind (norms of projections: ``["features.3.conv.3"]``); "block": behind the
            last norm of every residual branch; "stage": behind every stage.
        ratio: see `LightNonLocal2d`.
        stride: see `LightNonLocal2d`.

    Raises:
        UsageError: no place found, no example, or a module that does not give maps.
    """
    options = {"ratio": ratio, "stride": stride}
    return attach(model, example, f"{__name__}:LightNonLocal2d", at, options, "insert_nonlocal")


# expand, channels, stride, kernel, ratio, stride of the non-local layer, ratio of squeeze-and-excitation
_AUTONL_S: tuple[tuple[int, int, int, int, float | int, int, float | int], ...] = (
    (1, 16, 1, 3, 0, 1, 0),
    (3, 24, 2, 3, 0.25, 1, 0),
    (3, 24, 1, 3, 0, 1, 0),
    (3, 40, 2, 5, 0.25, 1, 0),
    (3, 40, 1, 3, 0.25, 2, 0),
    (3, 40, 1, 3, 0, 1, 0),
    (6, 80, 2, 5, 0.25, 1, 0.25),
    *((3, 80, 1, 3, 0, 1, 0.5),) * 2,
    (6, 96, 1, 5, 0.25, 1, 0.25),
    *((3, 96, 1, 3, 0, 1, 0.5),) * 3,
    (6, 192, 2, 5, 0.25, 1, 0.25),
    *((3, 192, 1, 5, 0, 1, 0.5),) * 3,
    (6, 320, 1, 5, 0.25, 1, 0.5),
)


class _Squeeze(nn.Module):
    """Squeeze-and-excitation with SiLU inside."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.expand = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class _Inverted(nn.Module):
    """Inverted residual: expand, depthwise, squeeze-and-excitation, project, LightNL, and the skip around them."""

    def __init__(self, in_channels: int, row: tuple[int, int, int, int, float | int, int, float | int]) -> None:
        super().__init__()
        expand, channels, stride, kernel, ratio, sampling, squeeze = row
        wide = in_channels * expand
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [nn.Conv2d(in_channels, wide, 1, bias=False), _norm(wide), nn.SiLU()]
        layers += [nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False), _norm(wide), nn.SiLU()]
        if squeeze:
            layers.append(_Squeeze(wide, max(1, int(in_channels * squeeze))))
        layers += [nn.Conv2d(wide, channels, 1, bias=False), _norm(channels)]
        if ratio:
            layers.append(LightNonLocal2d(channels, ratio, sampling))
        self.branch = nn.Sequential(*layers)
        self.around = stride == 1 and in_channels == channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = self.branch(x)
        return x + y if self.around else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def autonl_s(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> nn.Sequential:
    """Return AutoNL-S, the searched mobile network with seven LightNL layers: 4.4 M parameters, 267 M MACs at 224 px.

    Published top-1 76.5 % on ImageNet (arXiv 2004.01961). Its stages are in ``blocks``, its head is linear.
    """
    stem = nn.Sequential(nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False), _norm(32), nn.SiLU())
    blocks, channels = nn.Sequential(), 32
    for row in _AUTONL_S:
        blocks.append(_Inverted(channels, row))
        channels = row[1]
    head = nn.Sequential(nn.Conv2d(channels, 1280, 1, bias=False), _norm(1280), nn.SiLU())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(1280, num_classes))
    model = nn.Sequential()
    for name, part in (("stem", stem), ("blocks", blocks), ("head", head), ("classifier", pool)):
        model.add_module(name, part)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    return model
