"""WeightAlign: activations normalised by each filter's mean and variance (Shi et al. 2020, arXiv 2010.07160)."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from convette.errors import UsageError
from convette.layers._convolutions import plain_convolution
from convette.layers._folding import bake, can_bake
from convette.layers._modules import replace_modules
from convette.layers.normalization._residual import last_norms

Start = Literal["one", "exact", "zero", "keep"]
# With gamma = 1 a layer of rectified inputs keeps 1 - 1/pi of the variance: exact centring takes E[x]² away.
EXACT_GAIN = (1 - 1 / math.pi) ** -0.5


def variance_factor(act: str) -> float:
    """Return the share of a symmetric input's second moment that an activation lets through.

    "relu" 1/2, "linear" 1, "leaky(a)" (1 + a²)/2. Raises `UsageError` for another name.
    """
    if act in ("relu", "linear"):
        return 0.5 if act == "relu" else 1.0
    if act.startswith("leaky(") and act.endswith(")"):
        try:
            return (1 + float(act[6:-1]) ** 2) / 2
        except ValueError:
            pass
    raise UsageError(f"WeightAlign: act {act!r} is none of 'relu', 'linear', 'leaky(0.1)'.")


def align_weight(
    weight: Float[Tensor, "out *fan"], gain: Float[Tensor, " out"], act: str = "relu", eps: float = 1e-10
) -> Float[Tensor, "out *fan"]:
    r"""Return filters of mean 0 and fixed scaled variance.

    .. math:: \hat W_o = \gamma_o \frac{W_o - \mathrm{mean}(W_o)}{\sqrt{n f\, \mathrm{var}(W_o) + \epsilon}}

    over the n entries of filter o (biased variance), f from `variance_factor`; so ``|W_o| = |gamma_o| / sqrt(f)``.
    Computed in float32 for half precision. A filter whose entries are all equal becomes 0.
    """
    full = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    axes = tuple(range(1, weight.ndim))
    var, mean = torch.var_mean(full, axes, correction=0, keepdim=True)
    entries = weight[0].numel()
    scale = gain.to(full.dtype).view(-1, *[1] * len(axes)) * torch.rsqrt(entries * variance_factor(act) * var + eps)
    return ((full - mean) * scale).to(weight.dtype)


def _starting_gain(weight: Tensor, start: Start, act: str) -> Tensor:
    """Return the gains to begin with, (out,)."""
    if start == "keep":
        # The norm each centred filter has; its mean is lost all the same.
        axes = tuple(range(1, weight.ndim))
        centred = weight.detach() - weight.detach().mean(axes, keepdim=True)
        return centred.flatten(1).norm(dim=1) * math.sqrt(variance_factor(act))
    if start not in ("one", "exact", "zero"):
        raise UsageError(f"WeightAlign: init {start!r} is none of 'one', 'exact', 'zero', 'keep'.")
    value = {"one": 1.0, "exact": EXACT_GAIN, "zero": 0.0}[start]
    return torch.full((len(weight),), value, dtype=weight.dtype, device=weight.device)


def _check(weight: Tensor, what: str) -> None:
    if weight.ndim < 2 or weight[0].numel() < 2:
        raise UsageError(f"WeightAlign: {what} has filters of one entry, which have no variance; leave it as it is.")


class AlignedWeight(nn.Module):
    """Parametrization of a weight (out, ...): `align_weight` with a learned gain a filter. See `weight_align`."""

    bakes = True

    def __init__(self, weight: Tensor, act: str = "relu", eps: float = 1e-10, init: Start = "one") -> None:
        super().__init__()
        _check(weight, f"a weight {tuple(weight.shape)}")
        variance_factor(act)
        self.act, self.eps = act, eps
        self.gain = nn.Parameter(_starting_gain(weight, init, act))

    def forward(self, weight: Float[Tensor, "out *fan"]) -> Float[Tensor, "out *fan"]:
        return align_weight(weight, self.gain, self.act, self.eps)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, eps={self.eps}"


class WAConv2d(nn.Conv2d):
    r"""A convolution whose filters are aligned: mean 0 and variance 2/n times a learned gain, at every step.

    .. math:: y = \hat W * x + b, \quad
              \hat W_o = \gamma_o (W_o - \mathrm{mean}(W_o)) / \sqrt{\tfrac n2 \mathrm{var}(W_o) + \epsilon}

    n is the fan-in. For rectified inputs the output then has a fixed variance without any statistic of the
    activations: the same in training and inference, for any batch size. Alone, in the place of a convolution and its
    batch norm, it trains networks of moderate depth; deeper plain ones want residual branches (with ``init="zero"`` in
    the last layer of each) or another normaliser behind.

    Args:
        in_channels: as in `nn.Conv2d`, like all further arguments up to `dtype`.
        act: what made the input: "relu" (n/2), "linear" (n), "leaky(a)" (n (1 + a²)/2).
        eps: added to the scaled variance.
        init: of the gain: "one"; "exact" (1.2111), which keeps the variance of a plain ReLU stack but asks for a
            smaller learning rate; "zero", for the last layer of a residual branch.

    Raises:
        UsageError: filters of one entry (1x1 depthwise), an unknown `act` or `init`.

    Cost: one gain a filter, and a pass over the weights in training. Folds, exactly, to the `nn.Conv2d` with the
    aligned weights (`folded`). Gain initialisation and placement are ours.

    Source: WeightAlign: Normalizing Activations by Weight Alignment, Shi et al. 2020, arXiv 2010.07160.
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
        act: str = "relu",
        eps: float = 1e-10,
        init: Start = "one",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        _check(self.weight, f"a convolution {in_channels}->{out_channels} in {groups} groups")
        variance_factor(act)
        self.act, self.eps = act, eps
        self.gain = nn.Parameter(_starting_gain(self.weight, init, act))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def aligned_weight(self) -> Float[Tensor, "out fan rows columns"]:
        """Return the weights the convolution uses."""
        return align_weight(self.weight, self.gain, self.act, self.eps)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out rows columns"]:
        return self._conv_forward(input, self.aligned_weight(), self.bias)

    def folded(self) -> nn.Conv2d:
        """Return the plain convolution with the aligned weights: exact."""
        return plain_convolution(self, self.aligned_weight(), self.bias)


def weight_align(
    model: nn.Module,
    act: str = "relu",
    *,
    init: Start = "one",
    eps: float = 1e-10,
    where: Callable[[str, nn.Module], bool] | Sequence[str] | None = None,
    alone: bool = False,
) -> nn.Module:
    """Align the weights of the convolutions of `model`, as parametrizations; in place, returns the network.

    Any convolution class goes (`nn.Conv2d` and what derives from it), linear layers where `where` asks for them. Left
    alone: transposed convolutions, filters of one entry, weights that are parametrized already. A normaliser that
    follows stays: WeightAlign goes with any. `bake_weight_align`, or `convette.layers.fold_layers`, undoes it for
    inference.

    Args:
        model: any network.
        act: what makes the inputs; see `WAConv2d`.
        init: of the gains; "keep" gives each filter the norm it has without its mean, for trained networks.
        eps: see `WAConv2d`.
        where: ``where(name, module)`` says which layers, or patterns of their names; None: all convolutions.
        alone: take every batch norm out: the convolution before it gets a bias, and the last one of a residual branch
            starts with gain 0, as the sum would grow with depth otherwise. For networks that start anew.

    Raises:
        UsageError: an unknown `act` or `init`; with `alone`, a batch norm without an aligned convolution before it.
    """
    branch_ends = _take_norms_out(model) if alone else set()
    patterns = None if where is None or callable(where) else tuple(where)
    for name, module in list(model.named_modules()):
        if not isinstance(module, _ConvNd | nn.Linear) or isinstance(module, _ConvTransposeNd | WAConv2d):
            continue
        if patterns is not None:
            wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        else:
            wanted = where(name, module) if callable(where) else isinstance(module, _ConvNd)
        if not wanted or parametrize.is_parametrized(module, "weight") or module.weight[0].numel() < 2:
            continue
        start = "zero" if id(module) in branch_ends else init
        parametrize.register_parametrization(module, "weight", AlignedWeight(module.weight, act, eps, start))
    return model


def _take_norms_out(model: nn.Module) -> set[int]:
    """Replace batch norms by nothing, give the convolutions before them a bias; return those that end a branch."""
    around = {id(norm): shortcut for norm, shortcut in last_norms(model)}
    ends: set[int] = set()
    conv: _ConvNd | None = None
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            conv = module
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if conv is None or conv.out_channels != module.num_features or isinstance(conv, _ConvTransposeNd):
                raise UsageError(f"WeightAlign alone: no convolution stands before the batch norm {name!r}.")
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0].flatten(1)[:, 0]))
            if around.get(id(module)):
                ends.add(id(conv))
            # What timm's norms do besides normalising stays.
            rest = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
            chosen[name] = nn.Sequential(*rest) if rest else nn.Identity()
    replace_modules(model, lambda name, _: chosen.get(name))
    return ends


def bake_weight_align(model: nn.Module) -> nn.Module:
    """Write all aligned weights of `model` into plain ones, in place: exact. Returns the network."""
    for module in list(model.modules()):
        if can_bake(module) and any(isinstance(one, AlignedWeight) for one in module.modules()):
            bake(module)
    return replace_modules(model, lambda _, module: module.folded() if isinstance(module, WAConv2d) else None)


@torch.no_grad()
def revive_dead_filters(model: nn.Module) -> int:
    """Draw aligned filters anew whose entries are all equal (they are 0 and cannot learn); return how many.

    He-normal; the gains stay.
    """
    revived = 0
    for weight in _raw_weights(model):
        flat = weight.flatten(1)
        dead = flat.var(1, correction=0) * flat.shape[1] < 1e-9
        if bool(dead.any()):
            fresh = torch.randn_like(flat[dead]) * math.sqrt(2 / flat.shape[1])
            weight[dead] = fresh.view(-1, *weight.shape[1:])
            revived += int(dead.sum())
    return revived


def _raw_weights(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if isinstance(module, WAConv2d):
            found.append(module.weight)
        elif parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations["weight"]  # type: ignore[index]
            if any(isinstance(one, AlignedWeight) for one in chain):
                found.append(chain.original)
    return found
