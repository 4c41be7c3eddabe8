"""Batch normalization with skewness reduction: standardise, then bend the long tail in (Ding, Martin & Li 2020).

The bending map is a reconstruction: the paper's abstract says that a nonlinear map after batch norm reduces the third
moment too; the signed power, its exponents and options here are chosen to do that.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers._watching import hooked, in_eval
from convette.layers.normalization._moments import in_full

Mode = Literal["signed", "adaptive"]
# A running skewness of fewer batches is noise: until then both sides are bent.
_WARM_UP = 50


def signed_power(h: Float[Tensor, "*shape"], p: float | Tensor, smoothing: float = 0.05) -> Float[Tensor, "*shape"]:
    r"""Return ``sign(h) ((|h| + d)^p - d^p) / ((1 + d)^p - d^p)``: odd, increasing, -1, 0 and 1 stay where they are.

    With d = `smoothing` = 0 it is ``sign(h) |h|^p``, whose slope at 0 is infinite for p < 1. For p = 1 nothing changes;
    p < 1 pulls long tails in. The slope at 0 is ``p d^(p-1) / k``.
    """
    # A constant sign, 1 at 0, keeps the gradient at 0.
    sign = torch.where(h < 0, -1.0, 1.0).to(h.dtype)
    size = h * sign
    if smoothing == 0:
        return sign * size**p
    low = smoothing**p
    return sign * ((size + smoothing) ** p - low) / ((1 + smoothing) ** p - low)


def skewness(x: Float[Tensor, "n c *space"], eps: float = 1e-12) -> Float[Tensor, " c"]:
    """Return the skewness of each channel, the mean cube of the standardised values; float32 for half precision."""
    values = in_full(x)
    axes = (0, *range(2, x.ndim))
    var, mean = torch.var_mean(values, axes, correction=0, keepdim=True)
    return ((values - mean) * torch.rsqrt(var + eps)).pow(3).mean(axes)


class SkewReducedBatchNorm2d(nn.Module):
    r"""Batch norm whose standardised values go through a signed power map, which reduces their skewness.

    .. math:: y = \gamma\, \phi_p(h) + \beta, \quad h = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad
              \phi_p(h) = \mathrm{sign}(h) \frac{(|h| + d)^p - d^p}{(1 + d)^p - d^p}

    Args:
        num_features: channels c of an input (n, c, h, w).
        p: exponent, in (0, 1]; 1 is batch norm.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        affine: learn :math:`\gamma` (1 at the start) and :math:`\beta` (0).
        mode: "signed" bends both sides; "adaptive" the long side only, as the running skewness says (both sides for
            the first 50 batches).
        learned: learn an exponent for each channel, in (0.5, 1), starting at `p`.
        smoothing: d, which bounds the slope at 0; 0.1 or less.
        restandardize: standardise :math:`\phi(h)` once more, so that outputs have variance 1 again.
        allow_expand: accept p above 1, which makes skewness larger.

    Raises:
        UsageError: p out of range, an unknown mode, `learned` with a `p` outside (0.5, 1); an input of another shape,
            or fewer than two values a channel in training.

    Cost: a power an element, several times batch norm's price on a CPU. The standardisation (a `nn.BatchNorm2d`
    without scale) folds into the convolution before it; the map stays. With p = 1, given or reached by
    `anneal_to_bn`, the layer folds to `nn.BatchNorm2d`.

    Source: Improving Batch Normalization with Skewness Reduction for Deep Neural Networks, Ding, Martin and Li 2020,
    DOI 10.1109/ICPR48806.2021.9412949; reconstructed, see the module.
    """

    linearity: Tensor
    running_skewness: Tensor
    batches: Tensor

    def __init__(
        self,
        num_features: int,
        p: float = 0.9,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        mode: Mode = "signed",
        learned: bool = False,
        smoothing: float = 0.05,
        restandardize: bool = False,
        allow_expand: bool = False,
    ) -> None:
        super().__init__()
        if not p > 0 or (p > 1 and not allow_expand):
            raise UsageError(
                f"SkewReducedBatchNorm2d: p = {p!r} must be in (0, 1]; above 1 skewness grows (allow_expand=True)."
            )
        if mode not in ("signed", "adaptive"):
            raise UsageError(f"SkewReducedBatchNorm2d: mode {mode!r} is none of 'signed', 'adaptive'.")
        if learned and not 0.5 < p < 1:
            raise UsageError(f"SkewReducedBatchNorm2d: a learned exponent starts in (0.5, 1), not at p = {p!r}.")
        if not 0 <= smoothing <= 0.1:
            raise UsageError(f"SkewReducedBatchNorm2d: smoothing = {smoothing!r} must be in [0, 0.1].")
        self.p, self.mode, self.smoothing, self.momentum = p, mode, smoothing, momentum
        self.num_features = num_features
        self.norm: nn.Module = nn.BatchNorm2d(num_features, eps, momentum, affine=False)
        self.again = nn.BatchNorm2d(num_features, eps, momentum, affine=False) if restandardize else None
        start = 2 * (p - 0.5)
        self.exponents = nn.Parameter(torch.full((num_features,), math.log(start / (1 - start)))) if learned else None
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("linearity", torch.zeros(()))
        adaptive = mode == "adaptive"
        self.register_buffer("running_skewness", torch.zeros(num_features) if adaptive else None)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64) if adaptive else None)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        # The width is the tensors', which follow when channels are removed.
        width = x.shape[1] if self.weight is None else self.weight.shape[0]
        check_maps(x, width, "SkewReducedBatchNorm2d", self.training)
        h = self.norm(in_full(x))
        if self.mode == "adaptive" and self.training:
            self._track_skewness(h.detach())
        y = signed_power(h, self._powers(h), self.smoothing)
        if self.again is not None:
            y = self.again(y)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias.view(1, -1, 1, 1), y, self.weight.view(1, -1, 1, 1))
        return y.to(x.dtype)

    def powers(self) -> Float[Tensor, " c"]:
        """Return the exponent of each channel as it is now."""
        return self._exponents().expand(self.num_features if self.weight is None else len(self.weight))

    def _exponents(self) -> Tensor:
        start = self.p if self.exponents is None else 0.5 + 0.5 * torch.sigmoid(self.exponents)
        return start + (1 - start) * self.linearity

    def _powers(self, h: Tensor) -> Tensor:
        p = self._exponents()
        p = p if p.ndim == 0 else p.view(1, -1, 1, 1)
        if self.mode == "signed":
            return p
        skew = self.running_skewness.view(1, -1, 1, 1)
        return torch.where((h * skew > 0) | (self.batches < _WARM_UP), p, 1.0)

    @torch.no_grad()
    def _track_skewness(self, h: Tensor) -> None:
        new = h.pow(3).mean((0, 2, 3)).to(self.running_skewness.dtype)
        self.batches.add_(1)
        factor = 0.1 if self.momentum is None else self.momentum
        old = self.running_skewness
        old.copy_(torch.where(torch.isfinite(new), old.lerp(new, factor), old))

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Take scale, shift and statistics of the batch norm `old`; the function changes, as values are bent."""
        if not isinstance(old, nn.BatchNorm2d) or old.running_mean is None:
            return
        state = old.state_dict()
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None and name in state and state[name].shape == value.shape:
                value.copy_(state.pop(name))
        statistics = {name: value for name, value in state.items() if name not in ("weight", "bias")}
        if len(old.running_mean) == self.num_features:
            self.norm.load_state_dict(statistics, strict=False)

    def folded(self) -> nn.BatchNorm2d:
        """Return the batch norm this is when all exponents are 1; raises `Stays` otherwise."""
        powers = self.powers()
        if self.again is not None or not torch.equal(powers, torch.ones_like(powers)):
            raise Stays(
                "SkewReducedBatchNorm2d bends every value, which no plain layer does (its standardisation folds into"
                " the convolution before it); train on with anneal_to_bn to end at p = 1, which is batch norm."
            )
        if not isinstance(self.norm, nn.BatchNorm2d):
            raise Stays("SkewReducedBatchNorm2d: its standardisation is folded already; a scale and shift are left.")
        plain = nn.BatchNorm2d(len(powers), self.norm.eps, self.norm.momentum, self.weight is not None)
        plain.to(self.norm.running_mean)  # type: ignore[arg-type]
        state: dict[str, Any] = dict(self.norm.state_dict())
        if self.weight is not None and self.bias is not None:
            state |= {"weight": self.weight.detach(), "bias": self.bias.detach()}
        plain.load_state_dict(state)
        return plain.eval()

    def extra_repr(self) -> str:
        return f"{self.num_features}, p={self.p}, mode={self.mode!r}, learned={self.exponents is not None}"


def anneal_to_bn(model: nn.Module, fraction: float) -> None:
    """Move the exponents of all skew-reduced batch norms of `model` to ``p + (1 - p) fraction``; at 1 they are 1.

    Call it with a fraction that grows to 1 over a fine-tuning; the exported network is then pure batch norm.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"anneal_to_bn: fraction = {fraction!r} must be in [0, 1].")
    for module in model.modules():
        if isinstance(module, SkewReducedBatchNorm2d):
            module.linearity.fill_(fraction)


@dataclass(frozen=True)
class SkewReport:
    """Mean absolute skewness over channels: of a layer's standardised values, and of its outputs."""

    standardised: float
    output: float


@torch.no_grad()
def skewness_report(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, SkewReport]:
    """Return the `SkewReport` of every skew-reduced and plain batch norm of `model` by name (plain: both the same).

    The network runs in eval mode and is left as it was.
    """
    collected: dict[str, list[Tensor]] = {}
    inner = {id(module.norm) for module in model.modules() if isinstance(module, SkewReducedBatchNorm2d)} | {
        id(module.again) for module in model.modules() if isinstance(module, SkewReducedBatchNorm2d)
    }
    hooks = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Standardising is affine: the input's skewness is that of the standardised values.
            both = [skewness(inputs[0]).abs().mean(), skewness(output).abs().mean()]
            collected[name].append(torch.stack(both).double())

        return look

    for name, module in model.named_modules():
        if isinstance(module, SkewReducedBatchNorm2d) or (
            isinstance(module, nn.BatchNorm2d) and id(module) not in inner
        ):
            collected[name] = []
            hooks.append(module.register_forward_hook(watch(name)))
    with hooked(hooks), in_eval(model):
        for batch in batches:
            model(batch)
    means = {name: torch.stack(parts).mean(0).tolist() for name, parts in collected.items() if parts}
    return {name: SkewReport(before, after) for name, (before, after) in means.items()}
