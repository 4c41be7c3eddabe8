"""Consistent normalization: normalise once for each residual unit, with statistics that fit clean data.

A reconstruction. The observation (with strong augmentation, networks without normalisation overtake those with a batch
norm behind every convolution), its diagnosis and the aim are those of Zhou et al. 2019 (arXiv 1909.00182); the operator
is defined here, as the paper's code was never published.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers._modules import replace_modules
from convette.layers._watching import hooked, in_eval
from convette.layers.normalization._moments import channel_moments, normalise, running_factor, track
from convette.layers.normalization._residual import ResidualBlock, check_plain, residual_blocks
from convette.layers.normalization.sparse_switchable_normalization import SparseSwitchNorm2d

Stats = Literal["joint", "clean"]
Norm = Literal["batch", "switchable", "group", "layer"]


class ConsistentBatchNorm2d(nn.BatchNorm2d):
    """Batch norm for batches of two halves, clean images first: statistics of both, or of the clean half alone.

    With ``stats="clean"`` the moments of the first half normalise both (gradients flow through them), and the running
    statistics are the clean half's. Training and inference then apply the same affine map up to batch noise, and
    normalising keeps mixtures: ``N(lam a + (1 - lam) b) = lam N(a) + (1 - lam) N(b)``. Where a batch has no clean half,
    say so with `single_stream`. "joint" is `nn.BatchNorm2d`, as is eval mode, and it folds as one.

    Raises `UsageError` for an odd batch, or fewer than two values a channel in the clean half.
    """

    training_method: ClassVar[str] = "convette.training.methods.consistent_normalization:ConsistentTraining"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        stats: Stats = "joint",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        if stats not in ("joint", "clean"):
            raise UsageError(f"ConsistentBatchNorm2d: stats {stats!r} is none of 'joint', 'clean'.")
        self.stats: Stats = stats
        self.two_streams = stats == "clean"

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(input, self.num_features, "ConsistentBatchNorm2d", self.training)
        if not self.training or not self.two_streams:
            return super().forward(input)
        if input.shape[0] % 2:
            raise UsageError(f"ConsistentBatchNorm2d: {input.shape[0]} images are no clean and augmented halves.")
        clean = input[: input.shape[0] // 2]
        check_maps(clean, self.num_features, "ConsistentBatchNorm2d", training=True)
        moments = channel_moments(clean)
        assert self.running_mean is not None and self.running_var is not None
        values = clean.numel() // self.num_features
        track(self.running_mean, self.running_var, moments, values, running_factor(self))
        return normalise(input, moments, self.eps, self.weight, self.bias)

    def folded(self) -> nn.BatchNorm2d:
        """Return the batch norm this is at inference."""
        plain = nn.BatchNorm2d(self.num_features, self.eps, self.momentum, self.affine)
        assert self.running_mean is not None
        plain.to(self.running_mean)  # type: ignore[arg-type]
        plain.load_state_dict(self.state_dict())
        return plain.eval()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stats={self.stats!r}"


@contextlib.contextmanager
def single_stream(model: nn.Module) -> Iterator[None]:
    """Within the context batches of `model` are not two halves: statistics are those of the whole batch."""
    layers = [module for module in model.modules() if isinstance(module, ConsistentBatchNorm2d)]
    before = [layer.two_streams for layer in layers]
    try:
        for layer in layers:
            layer.two_streams = False
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.two_streams = was


def end_streams(model: nn.Module) -> nn.Module:
    """From here on batches of `model` are not two halves (as in `single_stream`, for good); returns the network."""
    for module in model.modules():
        if isinstance(module, ConsistentBatchNorm2d):
            module.two_streams = False
    return model


def _normaliser(norm: Norm, channels: int, stats: Stats) -> nn.Module:
    if norm != "batch" and stats != "joint":
        raise UsageError(f"consistent normalization: stats {stats!r} is for norm 'batch', not {norm!r}.")
    if norm == "batch":
        return ConsistentBatchNorm2d(channels, stats=stats)
    if norm == "switchable":
        return SparseSwitchNorm2d(channels)
    if norm == "group":
        groups = next(number for number in range(min(32, channels), 0, -1) if channels % number == 0)
        return nn.GroupNorm(groups, channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    raise UsageError(f"consistent normalization: norm {norm!r} is none of 'batch', 'switchable', 'group', 'layer'.")


class ConsistentUnit(nn.Module):
    r"""A residual unit with one normaliser at its tail and none at its convolutions.

    .. math:: y = \phi(N(\mathrm{shortcut}(x) + F(x))), \quad
              F(x) = s\, \mathrm{Conv}_m(\phi(\dots \mathrm{Conv}_1(x + b_{1a}) + b_{1b} \dots) + b_{ma}) + b_{mb}

    with :math:`\phi` = ReLU and learned scalars s = 1 and b = 0 at the start. ``pre_activation``:
    :math:`y = \mathrm{shortcut}(x) + F(\phi(N(x)))`, for networks much deeper than 50 layers.

    Args:
        convs: the convolutions, without normalisers; at least 2.
        norm: N, any module on the unit's output channels (its input's for `pre_activation`); `nn.Identity` gives a
            Fixup unit.
        shortcut: None: the identity; else a module, not normalised.
        units: L, how many units the network has; convolutions but the last are scaled by :math:`L^{-1/(2m-2)}`.
        pre_activation: see above.

    The convolutions are initialised anew (He-normal, scaled; the last one 0), as Fixup does (Zhang et al.,
    arXiv 1901.09321), so that at the start a unit is :math:`\phi(N(\mathrm{shortcut}(x)))`. Train the scalars at a
    tenth of the rate, without weight decay (`unit_scalars`).

    Cost: 2m + 1 scalars, one normaliser. With batch norm it folds (`folded`) to the same unit without normaliser, its
    scale and shift in the last convolution and in the shortcut; an identity shortcut keeps a multiplication a channel.
    The inner shifts b stay: before a convolution that pads with zeros they have no exact place.
    """

    training_method: ClassVar[str] = "convette.training.methods.consistent_normalization:ConsistentTraining"

    def __init__(
        self,
        convs: Iterable[nn.Conv2d],
        norm: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        units: int = 1,
        pre_activation: bool = False,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        if len(self.convs) < 2 or units < 1:
            raise UsageError(f"ConsistentUnit: {len(self.convs)} convolutions and {units} units; at least 2 and 1.")
        self.norm, self.pre_activation = norm, pre_activation
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.before = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in self.convs])
        self.after = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in self.convs])
        self.scale = nn.Parameter(torch.ones(()))
        self._initialise(units)

    @torch.no_grad()
    def _initialise(self, units: int) -> None:
        gain = units ** (-1 / (2 * len(self.convs) - 2))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            conv.weight.mul_(gain)
            if conv.bias is not None:
                conv.bias.zero_()
        last = self.convs[-1]
        assert isinstance(last, nn.Conv2d)
        last.weight.zero_()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        if self.pre_activation:
            return self.shortcut(x) + self.branch(functional.relu(self.norm(x)))
        return functional.relu(self.norm(self.shortcut(x) + self.branch(x)))

    def branch(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Return F(x)."""
        y = x
        last = len(self.convs) - 1
        for index, conv in enumerate(self.convs):
            y = conv(y + self.before[index])
            if index < last:
                y = functional.relu(y + self.after[index])
        return self.scale * y + self.after[last]

    @torch.no_grad()
    def folded(self) -> "FoldedUnit":
        """Return the unit without its batch norm: exact. Raises `Stays` for other normalisers and pre-activation."""
        if self.pre_activation:
            raise Stays("ConsistentUnit: with pre-activation, ReLU stands between the normaliser and the convolution.")
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            raise Stays(f"ConsistentUnit: its normaliser {type(norm).__name__} depends on the input at inference.")
        a = (norm.running_var.double() + norm.eps).rsqrt()
        b = -norm.running_mean.double() * a
        if norm.affine:
            a, b = a * norm.weight.double(), b * norm.weight.double() + norm.bias.double()
        return FoldedUnit(self, a, b)


class FoldedUnit(nn.Module):
    """A `ConsistentUnit` at inference: convolutions, shifts before them, and at most a multiplication a channel."""

    def __init__(self, unit: ConsistentUnit, a: Tensor, b: Tensor) -> None:
        super().__init__()
        last = len(unit.convs) - 1
        self.convs = copy.deepcopy(unit.convs)
        self.before = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in unit.before])
        self.after = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in unit.after[:last]])
        with torch.no_grad():
            _scale_rows(self.convs[-1], a * unit.scale.double(), a * unit.after[last].double() + b)
            shortcut = copy.deepcopy(unit.shortcut)
            self.factor = None
            if isinstance(shortcut, nn.Conv2d):
                _scale_rows(shortcut, a, torch.zeros_like(b))
            elif not bool((a == 1).all()):
                self.factor = nn.Parameter(a.to(unit.scale.dtype).view(1, -1, 1, 1))
        self.shortcut = shortcut
        self.eval()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        y = x
        for index, conv in enumerate(self.convs):
            y = conv(y + self.before[index])
            if index + 1 < len(self.convs):
                y = functional.relu(y + self.after[index])
        shortcut = self.shortcut(x)
        return functional.relu(y + (shortcut if self.factor is None else shortcut * self.factor))


def _scale_rows(conv: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make `conv` give ``scale * conv(x) + shift``, in place."""
    assert isinstance(conv, nn.Conv2d)
    dtype = conv.weight.dtype
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    conv.weight.copy_((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    conv.bias = nn.Parameter((bias * scale + shift).to(dtype))


def unit_scalars(model: nn.Module) -> list[nn.Parameter]:
    """Return the scalars of all consistent units; train them at a tenth of the rate, without weight decay."""
    units = [module for module in model.modules() if isinstance(module, ConsistentUnit)]
    return [p for unit in units for p in (unit.scale, *unit.before, *unit.after)]


def to_consistent(
    model: nn.Module, norm: Norm = "batch", stats: Stats = "joint", *, pre_activation: bool = False
) -> nn.Module:
    """Rewrite the residual blocks of `model` as consistent units, in place, and return the network.

    The network starts anew: convolutions of units are initialised as Fixup does, the last linear layer is 0. The stem
    keeps its normaliser (its type changes with `stats`). A ResNet-50 is left with 17 normalisers of 53.

    Args:
        model: a residual network whose blocks only convolve, normalise, activate and add (convette, torchvision, timm).
        norm: the normaliser at the tails.
        stats: "joint" or "clean", see `ConsistentBatchNorm2d`; "clean" also for the stem.
        pre_activation: see `ConsistentUnit`.

    Raises:
        UsageError: no residual blocks, blocks with other parts, or "clean" for a normaliser that is not batch norm.
    """
    blocks = residual_blocks(model)
    if not blocks:
        raise UsageError(
            "to_consistent: found no residual blocks (modules with conv1, bn1, conv2, bn2 and a shortcut)."
        )
    chosen: dict[str, nn.Module] = {}
    for block in blocks:
        check_plain(block, "to_consistent")
        chosen[block.name] = _unit(block, norm, stats, len(blocks), pre_activation)
    if stats == "clean":
        for name, module in model.named_modules():
            if type(module) is nn.BatchNorm2d and not any(name.startswith(f"{b.name}.") for b in blocks):
                chosen[name] = ConsistentBatchNorm2d(module.num_features, stats=stats).to(module.running_mean)  # type: ignore[arg-type]
    model = replace_modules(model, lambda name, _: chosen.get(name))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linear[-1:]:
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _unit(block: ResidualBlock, norm: Norm, stats: Stats, units: int, pre_activation: bool) -> ConsistentUnit:
    convs = [getattr(block.module, name) for name in block.convs]
    if not all(isinstance(conv, nn.Conv2d) for conv in convs):
        raise UsageError(f"to_consistent: block {block.name!r} has convolutions that are no nn.Conv2d.")
    shortcut = None if block.shortcut is None else getattr(block.module, block.shortcut)
    if isinstance(shortcut, nn.Sequential):
        parts = [part for part in shortcut if not isinstance(part, nn.BatchNorm2d | nn.Identity)]
        shortcut = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    channels = convs[0].in_channels if pre_activation else convs[-1].out_channels
    made = ConsistentUnit(
        convs, _normaliser(norm, channels, stats), shortcut, units=units, pre_activation=pre_activation
    )
    return made.to(convs[0].weight.device, convs[0].weight.dtype).train(block.module.training)


@dataclass(frozen=True)
class ConsistencyGap:
    """How far augmented inputs move the statistics of normalisers: by layer, and the mean over layers (0: none)."""

    layers: dict[str, float]
    mean: float


@torch.no_grad()
def consistency_gap(
    model: nn.Module,
    clean: Float[Tensor, "n c h w"],
    augmented: Float[Tensor, "m c h w"],
    *,
    layers: Callable[[nn.Module], bool] | None = None,
    eps: float = 1e-5,
) -> ConsistencyGap:
    r"""Return how much the input statistics of every normaliser differ between clean and augmented images.

    .. math:: G = \mathrm{mean}_c \frac{(\mu_a - \mu_c)^2}{\sigma_c^2 + \epsilon} + (\log \sigma_a - \log \sigma_c)^2

    over the channels of a layer's input, moments over batch and space. Use 512 images or more. `layers` chooses the
    modules; None: batch, group, instance and switchable norms. The network runs in eval mode and is left as it was.
    """
    wanted = layers or (
        lambda module: isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d | SparseSwitchNorm2d)
    )
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            moments = channel_moments(inputs[0].double())
            seen.setdefault(name, []).append((moments.mean.flatten(), moments.var.flatten()))

        return look

    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in model.named_modules() if wanted(m)]
    if not hooks:
        raise UsageError("consistency_gap: the network has no normaliser to look at.")
    with hooked(hooks), in_eval(model):
        model(clean)
        model(augmented)
    gaps = {}
    for name, runs in seen.items():
        half = len(runs) // 2  # a shared layer ran several times a forward
        (mean_c, var_c), (mean_a, var_a) = runs[0], runs[half]
        spread = 0.5 * ((var_a + eps).log() - (var_c + eps).log())
        gaps[name] = float(((mean_a - mean_c).square() / (var_c + eps) + spread.square()).mean())
    return ConsistencyGap(gaps, math.fsum(gaps.values()) / len(gaps))
