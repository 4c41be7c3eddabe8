"""SoAG: channel attention from second-order statistics of the features inside a network (Chen et al. 2020)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_batch, check_maps
from convette.layers._folding import Stays
from convette.layers.attention._placing import attach

Variant = Literal["norm", "pure"]


class SoAG(nn.Module):
    r"""Gate every channel by learned measurements of the second moments of the features over positions.

    .. math:: y = x \cdot \sigma(W_2\, \mathrm{leaky}(W_1 s)), \quad
              s_j = \tfrac1P \sum_p (u_j^T x_p)(t_j^T x_p) = u_j^T M t_j

    M = mean of x x^T over the P positions: `filters` rank-one measurements of the c x c matrix, from two 1x1
    convolutions multiplied value by value, without forming it. Squeeze-and-excitation sees the mean of every channel
    only; this sees how channels go together.

    Args:
        channels: c of an input (n, c, h, w).
        filters: measurements; None: min(128, 4 c). The cost is theirs.
        variant: "norm" (batch norm and leaky ReLU behind both convolutions and their product) or "pure" (nothing,
            for which the equation holds exactly).
        signed_root: take sign(s) sqrt|s|, which tames the tails of squares; None: for "pure" only.
        center: subtract the mean, s_j - (u_j^T m)(t_j^T m): covariance instead of second moment; "pure" only.
        tied: t = u, so that s >= 0.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: an unknown variant, `center` with "norm", an input of another shape or without positions; with
            "norm" in training, fewer than two values a channel.

    Cost: 2 c f + 6 f + f²/2 + f c/2 parameters (without the 6 f in "pure") and about 2 c f h w MACs, which is not
    little: at 16 channels, 32x32 and 512 filters 16.8 M. Folding: the norms behind the convolutions fold into them
    (`convette.fold`); product and gate depend on the input and stay.

    Source: Second-order Attention Guided Convolutional Activations for Visual Recognition, Chen et al., ICPR 2020.
    Its code was not published; the layers follow the bilinear branch of the group's later ASPNet, as described.
    """

    def __init__(
        self,
        channels: int,
        filters: int | None = None,
        variant: Variant = "norm",
        *,
        signed_root: bool | None = None,
        center: bool = False,
        tied: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        filters = min(128, 4 * channels) if filters is None else filters
        if variant not in ("norm", "pure"):
            raise UsageError(f"SoAG: variant {variant!r} is none of 'norm', 'pure'.")
        if center and variant == "norm":
            raise UsageError(
                "SoAG: center needs variant 'pure'; behind leaky ReLU there is no second moment to centre."
            )
        if filters < 2 or channels < 1:
            raise UsageError(f"SoAG: {filters} filters for {channels} channels; needs at least 2 for 1.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.variant, self.center = variant, center
        self.signed_root = variant == "pure" if signed_root is None else signed_root
        self.left = nn.Conv2d(channels, filters, 1, bias=False, **where)
        self.right = None if tied else nn.Conv2d(channels, filters, 1, bias=False, **where)
        with_norms = variant == "norm"
        self.norm_left: nn.Module | None = nn.BatchNorm2d(filters, **where) if with_norms else None
        self.norm_right: nn.Module | None = nn.BatchNorm2d(filters, **where) if with_norms and not tied else None
        self.norm: nn.Module | None = nn.BatchNorm2d(filters, **where) if with_norms else None
        self.fc1 = nn.Linear(filters, filters // 2, bias=False, **where)
        self.fc2 = nn.Linear(filters // 2, channels, bias=False, **where)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @property
    def channels(self) -> int:
        """Channels of the input; read off the weights, so that it follows when channels are removed."""
        return self.left.weight.shape[1]

    def statistics(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """Return s, the measurements of the second moments, before any root."""
        a = self.left(x)
        b = a if self.right is None else self.right(x)
        if self.norm is None or self.norm_left is None:
            # Squares of half-precision values overflow or lose their digits when summed up.
            a, b = (_full(one) for one in (a, b))
            s = (a * b).mean((2, 3))
            return s - a.mean((2, 3)) * b.mean((2, 3)) if self.center else s
        a = F.leaky_relu(self.norm_left(a))
        b = a if self.norm_right is None else F.leaky_relu(self.norm_right(b))
        return F.leaky_relu(self.norm(a * b)).mean((2, 3))

    def gate(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
        """Return the gates, 0 .. 1."""
        s = self.statistics(x)
        if self.signed_root:
            # The same as sign(s) sqrt(|s| + 1e-12) but smooth through 0, where that one jumps.
            s = s * torch.rsqrt(s.abs() + 1e-12)
        hidden = F.leaky_relu(self.fc1(s.to(x.dtype)))
        return torch.sigmoid(self.fc2(hidden))[..., None, None]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.channels, "SoAG")
        if x.shape[2] * x.shape[3] == 0:
            raise UsageError(f"SoAG: an input {tuple(x.shape)} has no positions to take moments over.")
        check_batch(x, "SoAG", self.training and self.norm is not None)
        return x * self.gate(x).to(x.dtype)

    def folded(self) -> nn.Module:
        """Raises `Stays`: the gate depends on the input."""
        raise Stays(
            "SoAG: product and gate depend on the input, so it is no plain layer; its norms fold into its convolutions."
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, filters={self.left.weight.shape[0]}, variant={self.variant!r}"


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def add_soag(
    model: nn.Module,
    example: Any = None,
    where: Literal["stage", "block"] | Sequence[str] = "stage",
    filters: int | None = None,
    variant: Variant = "norm",
) -> nn.Module:
    """Add `SoAG` to `model`, in place and logged as edits; returns the network.

    Args:
        model: any network of convette, timm or torchvision.
        example: an input, run once to see how many channels there are.
        where: "stage" (the paper's): behind every stage; "block": on every residual branch, behind its last norm
            and before the addition; or names of modules to stand behind.
        filters: see `SoAG`.
        variant: see `SoAG`.

    Raises:
        UsageError: no place found, no example, or a module that does not give maps.
    """
    options: dict[str, Any] = {"variant": variant} | ({} if filters is None else {"filters": filters})
    return attach(model, example, f"{__name__}:SoAG", where, options, "add_soag")
