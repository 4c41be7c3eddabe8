"""Lateral inhibition: a neuron's response lowered by those around it, before the activation (Ullah et al. 2020)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps, check_plain
from convette.layers._convolutions import plain_convolution
from convette.layers._folding import Stays
from convette.layers._stages import place_behind, stages

Mode = Literal["rectified", "linear"]


def surround_kernel(radius: int = 1, spread: float = 1.0) -> Float[Tensor, "rows columns"]:
    """Return the weights of the surround, (2 radius + 1)²: Gaussian of standard deviation `spread`, 0 in the centre,
    of sum 1. Raises `UsageError` for a radius below 1 or a spread that is not positive."""
    if radius < 1 or not spread > 0:
        raise UsageError(f"LateralInhibition2d: radius {radius} must be at least 1 and spread {spread} positive.")
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * spread**2))
    kernel[radius, radius] = 0
    return (kernel / kernel.sum()).float()


class _Bounded(torch.autograd.Function):
    """``clamp(x, 0, most)`` whose gradient also passes outside the bounds where it leads back inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(0.0, most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), grad = ctx.saved_tensors, grads[0]
        inward = ((x >= 0) | (grad < 0)) & ((x <= ctx.most) | (grad > 0))
        return torch.where(inward, grad, 0), None


class LateralInhibition2d(nn.Module):
    r"""Lower every response by a weighted mean of the responses around it in its channel.

    .. math:: y_{c} = z_{c} - \tau_c\, (K * a_c), \quad a = \mathrm{relu}(z) \text{ or } z

    K is a fixed Gaussian surround of sum 1 without centre (`surround_kernel`), applied with replicated borders, so
    that a flat region is inhibited evenly up to its edge: a constant map m > 0 becomes (1 - tau) m. It belongs between
    a convolution's norm and its activation (`add_inhibition`). Behind a norm, activity falls with tau; a norm put
    behind it would undo that.

    Args:
        num_features: channels c of an input (n, c, h, w).
        radius: of the surround, 1 to 3: 3x3, 5x5 or 7x7 values.
        mode: "rectified": only active neurons inhibit, a = relu(z), so that y <= z; "linear": a = z.
        spread: standard deviation of the Gaussian, in pixels.
        init: tau to begin with; 0 changes nothing (fine-tuning), 0.1 from scratch.
        contrast: multiply y by 1 + tau, so that isolated peaks grow: a constant m becomes (1 + tau)(1 - tau) m.
        most: upper limit of tau, below 1 so that flat regions stay positive.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    tau is learned, one a channel, used between 0 and `most`; as a vector it gets no weight decay from
    `convette.training`.

    Raises:
        UsageError: a radius below 1, an unknown mode, tau or its limit outside 0 .. 1, an input of another shape.

    Cost: c parameters and (2 radius + 1)² c h w MACs. Folding: with all tau at 0 it is nothing; "linear" is one
    depthwise convolution with replicated borders; "rectified" depends on the signs of its input and stays.

    Source: Enhancing Semantic Segmentation of Aerial Images with Inhibitory Neurons, Ullah, Reilly, Madden, ICPR 2020.
    No code was published: the place (outputs of convolutions) and the purpose are the paper's, this kernel is ours,
    after the receptive and inhibitory fields of Fernandes, Cavalcanti, Ren 2013.
    """

    kernel: Tensor

    def __init__(
        self,
        num_features: int,
        radius: int = 1,
        mode: Mode = "rectified",
        *,
        spread: float = 1.0,
        init: float = 0.1,
        contrast: bool = False,
        most: float = 0.9,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if mode not in ("rectified", "linear"):
            raise UsageError(f"LateralInhibition2d: mode {mode!r} is none of 'rectified', 'linear'.")
        if not 0 <= init <= most < 1:
            raise UsageError(f"LateralInhibition2d: init {init} and most {most} must be 0 <= init <= most < 1.")
        self.radius, self.mode, self.spread, self.contrast, self.most = radius, mode, spread, contrast, most
        self.tau = nn.Parameter(torch.full((num_features,), float(init), device=device, dtype=dtype))
        self.register_buffer("kernel", surround_kernel(radius, spread).to(device, dtype), persistent=False)

    @property
    def num_features(self) -> int:
        """Channels of the input; read off the parameter, so that it follows when channels are removed."""
        return self.tau.shape[0]

    def strength(self) -> Float[Tensor, " c"]:
        """Return tau as it is used, between 0 and `most`."""
        return _Bounded.apply(self.tau, self.most) if self.training else self.tau.clamp(0.0, self.most)  # type: ignore[return-value]

    def inhibition(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return K * a, what the surroundings of every neuron amount to, before tau."""
        return self._surround(x, torch.ones_like(self.tau))

    def _surround(self, x: Tensor, strength: Tensor) -> Tensor:
        active = F.relu(x) if self.mode == "rectified" else x
        kernel = (strength.view(-1, 1, 1, 1) * self.kernel).to(x.dtype)
        return F.conv2d(F.pad(active, (self.radius,) * 4, mode="replicate"), kernel, groups=x.shape[1])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.num_features, "LateralInhibition2d")
        tau = self.strength()
        y = x - self._surround(x, tau)
        return (y * (1 + tau.view(-1, 1, 1)) if self.contrast else y).to(x.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return `nn.Identity` where nothing is inhibited, a depthwise convolution for "linear"; else raise `Stays`."""
        tau = self.tau.clamp(0.0, self.most)
        if not bool(tau.any()):
            return nn.Identity()
        if self.mode == "rectified":
            raise Stays(
                "LateralInhibition2d rectifies what inhibits: the sum depends on the signs of its input and is no"
                " convolution (mode='linear' is one)."
            )
        channels, side = self.num_features, 2 * self.radius + 1
        place: dict[str, Any] = {"padding": self.radius, "groups": channels, "padding_mode": "replicate"}
        plain = nn.Conv2d(channels, channels, side, bias=False, **place)
        weight = -tau.view(-1, 1, 1, 1) * self.kernel
        weight[:, 0, self.radius, self.radius] += 1
        plain.weight = nn.Parameter(weight * (1 + tau.view(-1, 1, 1, 1)) if self.contrast else weight)
        return plain.eval()

    def extra_repr(self) -> str:
        gain = ", contrast=True" if self.contrast else ""
        return f"{self.num_features}, radius={self.radius}, mode={self.mode!r}, spread={self.spread}{gain}"


class RingInhibitedConv2d(nn.Conv2d):
    r"""A convolution whose inputs just outside the receptive field inhibit: the variant nearest to its ancestors.

    .. math:: y_o = W_o * x + b_o - \epsilon \sum_i S_{o,i}\, \overline{x}_i, \quad S_{o,i} = \mathrm{mean} |W_{o,i}|

    :math:`\overline{x}` is the mean over the ring of width `ring` around the k x k window, borders replicated.
    epsilon is one learned number a layer; 0 gives the plain convolution.

    Args:
        in_channels: as in `nn.Conv2d`, like all further arguments up to `dtype`.
        ring: width d of the ring.
        init: epsilon to begin with.

    Raises:
        UsageError: a dilation, padding by name or mode, or a ring below 1.

    Cost: one parameter, one mean over the window and its ring, and a 1x1 convolution. Folding: at epsilon = 0 the
    plain convolution; else a kernel of k + 2 d is the same only away from the borders, so it stays.

    Source: see `LateralInhibition2d`; reconstructed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        ring: int = 1,
        init: float = 0.05,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        check_plain("RingInhibitedConv2d", dilation=self.dilation, padding=padding, padding_mode=padding_mode)
        if ring < 1:
            raise UsageError(f"RingInhibitedConv2d: ring {ring} must be at least 1.")
        self.ring = ring
        self.strength = nn.Parameter(torch.tensor(float(init), device=device, dtype=dtype))

    def ring_mean(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c rows columns"]:
        """Return the mean of the ring around every window, borders replicated."""
        (rows, columns), d = self.kernel_size, self.ring
        (above, left) = self.padding  # type: ignore[misc]
        padded = F.pad(x, (left + d, left + d, above + d, above + d), mode="replicate")  # type: ignore[operator]
        large, small = (rows + 2 * d, columns + 2 * d), (rows, columns)
        outer = F.avg_pool2d(padded, large, self.stride)
        inner = F.avg_pool2d(padded[:, :, d:-d, d:-d], small, self.stride)
        whole, part = large[0] * large[1], rows * columns
        return (outer * whole - inner * part) / (whole - part)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out rows columns"]:
        strengths = self.weight.abs().mean((2, 3), keepdim=True)
        inhibition = F.conv2d(self.ring_mean(input), strengths, groups=self.groups)
        return super().forward(input) - (self.strength * inhibition).to(inhibition.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """Return the plain convolution where epsilon is 0; else raise `Stays`."""
        if float(self.strength) != 0:
            raise Stays(
                "RingInhibitedConv2d: one larger kernel does the same only away from the borders, which it replicates"
                " for the ring and fills with zeros for the window."
            )
        return plain_convolution(self, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ring={self.ring}"


def inhibition_sites(model: nn.Module, where: str = "stage_end") -> list[str]:
    """Return the convolutions of kernel 3x3 or more that lateral inhibition goes with.

    `where`: "stage_end" (the default, for cost): the last of every stage; "all": every one. Depthwise ones are left
    out: they are filters of one channel already. Raises `UsageError` where there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and min(module.kernel_size) >= 3
        and (module.groups == 1 or module.groups < module.in_channels)
    ]
    if where == "stage_end":
        within = [[name for name in found if stage.holds(name)] for stage in stages(model)]
        found = [names[-1] for names in within if names]
    elif where != "all":
        raise UsageError(f"add_inhibition: where {where!r} is none of 'stage_end', 'all'.")
    if not found:
        raise UsageError(f"add_inhibition: {type(model).__name__} has no 3x3 convolution ({where}).")
    return found


def add_inhibition(
    model: nn.Module,
    where: Literal["stage_end", "all"] = "stage_end",
    mode: Literal["surround", "ring"] = "surround",
    init: float = 0.0,
    *,
    radius: int = 1,
    inhibits: Mode = "rectified",
    contrast: bool = False,
) -> nn.Module:
    """Add lateral inhibition to convolutions of `model`, in place and logged as edits; returns the network.

    Args:
        model: any network of convette, timm or torchvision; heads of segmentation networks are left alone with
            "stage_end".
        where: see `inhibition_sites`.
        mode: "surround" puts `LateralInhibition2d` behind the norm of each convolution, before the activation;
            "ring" makes each a `RingInhibitedConv2d` with the same weights.
        init: tau or epsilon to begin with; 0 keeps the outputs bit for bit.
        radius: of the surround, or width of the ring.
        inhibits: `mode` of `LateralInhibition2d`.
        contrast: see `LateralInhibition2d`.

    Raises:
        UsageError: no convolution found, or an unknown name.
    """
    from convette.surgery import Append, apply, convert_edits

    if mode not in ("surround", "ring"):
        raise UsageError(f"add_inhibition: mode {mode!r} is none of 'surround', 'ring'.")
    names = inhibition_sites(model, where)
    here = f"{__name__}:"
    if mode == "ring":
        from convette.surgery import Replacement

        kind = Replacement(RingInhibitedConv2d, {"ring": radius, "init": init})
        apply(model, *convert_edits(model, {nn.Conv2d: kind}, include=names))
        return model
    shared = {"radius": radius, "mode": inhibits, "init": init, "contrast": contrast}
    edits = [
        Append(
            place_behind(model, name),
            f"{here}LateralInhibition2d",
            {"num_features": model.get_submodule(name).out_channels, **shared},
        )
        for name in names
    ]
    apply(model, *edits)
    return model
