"""Sparse switchable normalization: layers learn to pick one of instance, layer and batch norm (Shao et al. 2019)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers._modules import replace_modules
from convette.layers.normalization._moments import (
    Moments,
    batch_moments,
    instance_moments,
    layer_moments,
    normalise,
    track,
)
from convette.layers.normalization._sparsestmax import switch_ratios

NORMALISERS = ("in", "ln", "bn")
# Ratios this close to one-hot are: float arithmetic does not give exactly 1.
_ONE_HOT = 1 - 1e-6


class SparseSwitchNorm2d(nn.Module):
    r"""Normalise with learned ratios of instance, layer and batch statistics that end one-hot: one normaliser.

    .. math:: y = \gamma \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k p'_k \sigma_k^2 + \epsilon}} + \beta, \quad
              p = \mathrm{SparsestMax}(z; r), \; p' = \mathrm{SparsestMax}(z'; r)

    with k in (in, ln, bn) and learned z, z', 1 at the start. Layer and batch moments come from the instance moments,
    which take one pass. The radius r grows from 0 to 1 in training (`set_radius`, `RadiusSchedule`, or the training
    method `SparseSwitch`); ratios that have become one-hot are kept and no longer learn, means and variances each for
    themselves. In eval mode "bn" uses running statistics, the others the sample's own.

    Args:
        num_features: channels c of an input (n, c, h, w).
        eps: added to the variance.
        momentum: weight of a batch in the running statistics (the authors': 0.003).
        affine: learn :math:`\gamma` (1 at the start) and :math:`\beta` (0).
        candidates: which of "in", "ln", "bn" may be picked; a target without layer norm leaves it out.
        last_gamma: start :math:`\gamma` at 0: the last normaliser of a residual branch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: unknown or no candidates; an input of another shape; in training, fewer than two values a channel,
            or 1x1 maps where "in" may be picked.

    Variances are biased throughout, so that a one-hot layer equals the normaliser it picked, but for running
    variances, which are unbiased as in `nn.BatchNorm2d`. Cost: 2 parameters a candidate; one pass for the moments and
    one to normalise. Folds to `nn.BatchNorm2d`, `nn.InstanceNorm2d`, `nn.GroupNorm` of one group, or `TwoMomentNorm2d`
    once both choices are one-hot; only batch norm folds on into a convolution.

    Source: SSN: Learning Sparse Switchable Normalization via SparsestMax, Shao et al. 2019, arXiv 1903.03793.
    """

    training_method: ClassVar[str] = (
        "convette.training.methods.sparse_switchable_normalization:SparseSwitch"  # what it is trained with
    )
    running_mean: Tensor
    running_var: Tensor
    radius: Tensor
    frozen: Tensor
    picks: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        candidates: Sequence[str] = NORMALISERS,
        last_gamma: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in candidates if name not in NORMALISERS]
        if unknown or not candidates or len(set(candidates)) < len(candidates):
            raise UsageError(f"SparseSwitchNorm2d: candidates {list(candidates)} must be some of 'in', 'ln', 'bn'.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eps, self.momentum, self.affine = eps, momentum, affine
        self.candidates = tuple(candidates)
        count = len(self.candidates)
        self.mean_logits = nn.Parameter(torch.ones(count, **where))
        self.var_logits = nn.Parameter(torch.ones(count, **where))
        if affine:
            start = torch.zeros if last_gamma else torch.ones
            self.weight = nn.Parameter(start(num_features, **where))
            self.bias = nn.Parameter(torch.zeros(num_features, **where))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features, **where))
        self.register_buffer("running_var", torch.ones(num_features, **where))
        self.register_buffer("radius", torch.zeros((), **where))
        # Of means and of variances: whether the ratios are decided, and for which candidate. Whole numbers, as an
        # average over weights would take the middle of two choices.
        self.register_buffer("frozen", torch.tensor([count == 1] * 2, device=device))
        self.register_buffer("picks", torch.zeros(2, dtype=torch.int64, device=device))

    @property
    def num_features(self) -> int:
        """Channels of the input; read off the tensors, so that it follows when channels are removed."""
        return self.running_mean.shape[0]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.num_features, "SparseSwitchNorm2d", self.training and "bn" in self.candidates)
        if self.training and "in" in self.candidates and x.shape[2] * x.shape[3] == 1:
            raise UsageError(
                "SparseSwitchNorm2d: 1x1 maps have no instance statistics; leave 'in' out of the candidates."
            )
        moments = self._moments(x)
        means, variances = self.ratios()
        mean = sum(ratio * moments[name].mean for ratio, name in zip(means, self.candidates, strict=True))
        var = sum(ratio * moments[name].var for ratio, name in zip(variances, self.candidates, strict=True))
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        return normalise(x, Moments(mean, var), self.eps, self.weight, self.bias)

    def _moments(self, x: Tensor) -> dict[str, Moments]:
        instance = instance_moments(x)
        moments = {"in": instance}
        if "ln" in self.candidates:
            moments["ln"] = layer_moments(instance)
        if "bn" not in self.candidates:
            return moments
        if self.training:
            moments["bn"] = batch_moments(instance)
            values = x.shape[0] * x.shape[2] * x.shape[3]
            track(self.running_mean, self.running_var, moments["bn"], values, self.momentum)
        else:
            moments["bn"] = Moments(self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1))
        return moments

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return the ratios of means and of variances, each (candidates,), as they are now."""
        logits = torch.stack([self.mean_logits, self.var_logits])
        live = switch_ratios(logits, self.radius)
        # Through where, frozen ratios have gradient 0, and momentum left in an optimiser cannot move them.
        p = torch.where(self.frozen[:, None], self._kept().to(live.dtype), live)
        return p[0], p[1]

    def _kept(self) -> Tensor:
        return self.picks[:, None] == torch.arange(len(self.candidates), device=self.picks.device)

    @torch.no_grad()
    def set_radius(self, radius: float) -> None:
        """Set the radius (0 to 1) and keep the ratios that have become one-hot for good."""
        self.radius.fill_(radius)
        ratios = torch.stack(self.ratios())
        one_hot = ratios.amax(1) - ratios.amin(1) >= _ONE_HOT
        fresh = one_hot & ~self.frozen
        self.picks.copy_(torch.where(fresh, ratios.argmax(1), self.picks))
        self.frozen.logical_or_(one_hot)

    @torch.no_grad()
    def decide(self) -> None:
        """Freeze whatever is still open at its largest ratio (the first of a tie), as when training ended early."""
        self.set_radius(1.0)
        ratios = torch.stack(self.ratios())
        self.picks.copy_(ratios.argmax(1))
        self.frozen.fill_(True)

    def choice(self) -> tuple[str, str] | None:
        """Return what mean and variance picked, as ("bn", "in"); None while one of them is still open."""
        if not bool(self.frozen.all()):
            return None
        mean, var = self.picks.tolist()
        return self.candidates[mean], self.candidates[var]

    def folded(self) -> nn.Module:
        """Return the one normaliser this has become; raises `Stays` while the ratios are still open."""
        picked = self.choice()
        if picked is None:
            raise Stays(
                "SparseSwitchNorm2d: the ratios are not one-hot yet; train until the radius is 1, or call decide()."
            )
        mean, var = picked
        if mean == var == "bn":
            made: nn.Module = nn.BatchNorm2d(self.num_features, self.eps, self.momentum, self.affine)
        elif mean == var == "in":
            made = nn.InstanceNorm2d(self.num_features, self.eps, affine=self.affine)
        elif mean == var == "ln":
            made = nn.GroupNorm(1, self.num_features, self.eps, self.affine)
        else:
            made = TwoMomentNorm2d(self.num_features, self.eps, self.affine, mean=mean, var=var)
        made.to(self.running_mean)
        names = {*dict(made.named_parameters()), *dict(made.named_buffers())}
        made.load_state_dict({name: value for name, value in self.state_dict().items() if name in names}, strict=False)
        return made.eval()

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, candidates={self.candidates}"


class TwoMomentNorm2d(nn.Module):
    """One normaliser's mean with another's variance, for inference: ``(x - mu_j) / sqrt(var_k + eps) * gamma + beta``.

    What a `SparseSwitchNorm2d` becomes whose mean and variance chose differently. `mean` and `var` are "in", "ln" or
    "bn"; "bn" always means running statistics. It does not fold further: one of both depends on the input.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, *, mean: str = "in", var: str = "bn"
    ) -> None:
        super().__init__()
        if mean not in NORMALISERS or var not in NORMALISERS:
            raise UsageError(f"TwoMomentNorm2d: mean {mean!r} and var {var!r} must each be 'in', 'ln' or 'bn'.")
        self.eps, self.mean, self.var = eps, mean, var
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @property
    def num_features(self) -> int:
        """Channels of the input; read off the tensors, so that it follows when channels are removed."""
        return self.running_mean.shape[0]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.num_features, "TwoMomentNorm2d", training=False)
        instance = instance_moments(x)
        moments = {"in": instance}
        if "ln" in (self.mean, self.var):
            moments["ln"] = layer_moments(instance)
        if "bn" in (self.mean, self.var):
            moments["bn"] = Moments(self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1))
        return normalise(x, Moments(moments[self.mean].mean, moments[self.var].var), self.eps, self.weight, self.bias)

    def folded(self) -> nn.Module:
        """Raise `Stays`: one of both moments is the input's."""
        raise Stays(f"TwoMomentNorm2d takes its mean as {self.mean!r} and its variance as {self.var!r}: no plain norm.")

    def extra_repr(self) -> str:
        return f"{self.num_features}, mean={self.mean!r}, var={self.var!r}"


def switch_layers(model: nn.Module) -> dict[str, SparseSwitchNorm2d]:
    """Return the sparse switchable layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseSwitchNorm2d)}


def ratio_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn ratios; train them at a tenth of the rate, without weight decay."""
    return [p for layer in switch_layers(model).values() for p in (layer.mean_logits, layer.var_logits)]


class RadiusSchedule:
    """The radius of all sparse switchable layers as a function of the step: linear, 0 to 1 over `total_steps`.

    Call it with the number of steps done, before each step and once at the end; a resumed run goes on where it was.
    """

    def __init__(self, total_steps: int) -> None:
        if total_steps < 1:
            raise UsageError(f"RadiusSchedule: total_steps = {total_steps} must be at least 1.")
        self.total_steps = total_steps

    def __call__(self, model: nn.Module, step: int) -> float:
        """Set the radius for `step` on all layers of `model` and return it."""
        radius = min(1.0, step / self.total_steps)
        for layer in switch_layers(model).values():
            layer.set_radius(radius)
        return radius


def collapse(model: nn.Module, *, force: bool = False) -> nn.Module:
    """Replace every sparse switchable layer of `model` by the one normaliser it picked; in place, returns the network.

    Exact in eval mode. Raises `Stays` where ratios are still open; with `force` the largest ratio is taken there, which
    changes the outputs: recalibrate or train on.
    """

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseSwitchNorm2d):
            return None
        if force and module.choice() is None:
            module.decide()
        return module.folded().train(module.training)

    return replace_modules(model, choose)
