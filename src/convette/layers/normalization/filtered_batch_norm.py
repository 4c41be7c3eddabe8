"""Filtered batch normalization: mean and variance without the outlying activations (Horváth & Al-afandi 2020)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convette.errors import UsageError
from convette.layers._checks import check_batch, check_maps
from convette.layers._folding import Stays
from convette.layers._modules import replace_modules
from convette.layers._watching import hooked, in_eval
from convette.layers.normalization._moments import (
    Moments,
    channel_moments,
    in_full,
    normalise,
    running_factor,
    track,
)


def inliers(
    x: Float[Tensor, "n c *space"], threshold: float = 4.0, eps: float = 1e-5, *, one_sided: bool = False
) -> Tensor:
    """Return which values of `x` lie within `threshold` standard deviations of their channel's mean (bool).

    ``|x - mean| < T sqrt(var + eps)`` with the unbiased variance, over batch and space. `one_sided`: only values above
    are outliers (for inputs that are never negative). No gradient. By Chebyshev at most ``1 / T²`` are outliers.
    """
    values = in_full(x.detach())
    return _within(values, _unbiased(channel_moments(values), x.numel() / x.shape[1]), threshold, eps, one_sided)


def _unbiased(found: Moments, count: Tensor | float) -> Moments:
    """Return moments whose variance is divided by one less than the number of values."""
    number = torch.as_tensor(count, dtype=found.var.dtype, device=found.var.device)
    return Moments(found.mean, found.var * (number / (number - 1).clamp_min(1)))


def _within(values: Tensor, moments: Moments, threshold: float, eps: float, one_sided: bool) -> Tensor:
    distance = values - moments.mean
    return (distance if one_sided else distance.abs()) < threshold * (moments.var + eps).sqrt()


def filtered_moments(
    x: Float[Tensor, "n c *space"],
    threshold: float = 4.0,
    eps: float = 1e-5,
    *,
    iterations: int = 1,
    one_sided: bool = False,
) -> tuple[Moments, Tensor]:
    """Return the moments (1, c, 1, ...) of the `inliers` of `x`, biased, and how many those are (1, c, 1, ...).

    With `iterations` above 1, outliers are looked for again with the moments of what was left (sigma clipping).
    Gradients go through the kept values only.
    """
    values = in_full(x)
    around = _unbiased(channel_moments(values.detach()), x.numel() / x.shape[1])
    for _ in range(iterations - 1):
        kept, count = _masked_moments(values.detach(), around, threshold, eps, one_sided)
        around = _unbiased(kept, count)
    if torch.is_grad_enabled() and values.requires_grad:
        mean, var, count = _Filtered.apply(values, around.mean, around.var, threshold, eps, one_sided)  # type: ignore[misc]
        return Moments(mean, var), count
    return _masked_moments(values, around, threshold, eps, one_sided)


def _masked_moments(
    values: Tensor, around: Moments, threshold: float, eps: float, one_sided: bool
) -> tuple[Moments, Tensor]:
    """Return the moments of the values within bounds around `around` and their number: one pass."""
    axes = (0, *range(2, values.ndim))
    distance, inside = _bounded(values, around, threshold, eps, one_sided)
    count = inside.sum(axes, keepdim=True)
    distance = distance * inside
    rest = distance.sum(axes, keepdim=True) / count
    var = (distance.square().sum(axes, keepdim=True) / count - rest.square()).clamp_min(0)
    return Moments(around.mean + rest, var), count


def _bounded(values: Tensor, around: Moments, threshold: float, eps: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Return distances from the mean, cut off at the bounds, and `_within` as numbers 0 and 1.

    Cut off, as an infinite outlier times 0 is no number. Numbers, as compiled code stores and sums truth values one by
    one, eight times as slowly.
    """
    bound = threshold * (around.var + eps).sqrt()
    distance = values - around.mean
    size = distance if one_sided else distance.abs()
    inside = (bound - size).clamp_min(0).sign()
    if math.isfinite(threshold):
        distance = torch.minimum(torch.maximum(distance, -bound), bound) if not one_sided else distance.minimum(bound)
    return distance, inside


class _Filtered(torch.autograd.Function):
    """`_masked_moments` with its backward pass in one go, in which the mask is constant."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mean: Tensor, var: Tensor, threshold: float, eps: float, one_sided: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        found, count = _masked_moments(values, Moments(mean, var), threshold, eps, one_sided)
        ctx.save_for_backward(values, mean, var, found.mean, count)
        ctx.bounds = threshold, eps, one_sided
        ctx.mark_non_differentiable(count)
        return found.mean, found.var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, mean, var, found, count = ctx.saved_tensors
        distance, inside = _bounded(values, Moments(mean, var), *ctx.bounds)
        slope = torch.addcmul(grads[0] / count, distance + (mean - found), 2 * grads[1] / count)
        return slope * inside, None, None, None, None, None


def truncated_variance(threshold: float) -> float:
    """Return the variance of a standard Gaussian cut off at ± `threshold`: 0.774 at 2, 0.973 at 3, 0.9989 at 4."""
    if math.isinf(threshold):
        return 1.0
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * threshold * density / math.erf(threshold / math.sqrt(2))


class _FilteredBatchNorm(_BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        threshold: float = 4.0,
        iterations: int = 1,
        one_sided: bool = False,
        compensate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not threshold >= 1:
            raise UsageError(f"FilteredBatchNorm: threshold = {threshold!r} must be at least 1 standard deviation.")
        if iterations < 1:
            raise UsageError(f"FilteredBatchNorm: iterations = {iterations!r} must be at least 1.")
        self.threshold, self.iterations = threshold, iterations
        self.one_sided, self.compensate = one_sided, compensate

    def _statistics(self, x: Tensor) -> Tensor:
        """Normalise with the batch's filtered moments, tracking them where asked."""
        check_batch(x, type(self).__name__)
        moments, count = filtered_moments(
            x, self.threshold, self.eps, iterations=self.iterations, one_sided=self.one_sided
        )
        if self.compensate:
            moments = Moments(moments.mean, moments.var / truncated_variance(self.threshold))
        if self.training and self.running_mean is not None and self.running_var is not None:
            track(self.running_mean, self.running_var, moments, count, running_factor(self))
        return normalise(x, moments, self.eps, self.weight, self.bias)

    def _run(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training or self.running_mean is None:
            return self._statistics(x)
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"

    def _plain(self, plain: type[_BatchNorm]) -> _BatchNorm:
        if self.running_mean is None:
            raise Stays(f"{type(self).__name__} without running statistics depends on the batch at inference.")
        norm = plain(self.num_features, self.eps, self.momentum, self.affine, device=self.running_mean.device)
        norm.to(self.running_mean.dtype).load_state_dict(self.state_dict())
        return norm.eval()


class FilteredBatchNorm2d(_FilteredBatchNorm):
    r"""Batch norm whose mean and variance leave out activations beyond T standard deviations; all are normalised.

    .. math:: \mu = \frac{\sum_i M_i x_i}{\sum_i M_i}, \quad s^2 = \frac{\sum_i M_i (x_i - \mu)^2}{\sum_i M_i}, \quad
              y_i = \gamma \frac{x_i - \mu}{\sqrt{s^2 + \epsilon}} + \beta

    over the m = n·h·w values of a channel, where :math:`M_i = 1` if :math:`|x_i - \mu_0| < T \sqrt{s_0^2 + \epsilon}`
    with the plain mean and unbiased variance :math:`\mu_0, s_0^2`, else 0. The mask has no gradient. It is meant
    before the activation function. With T = 4 nothing is left out of 17 values or fewer.

    Args:
        num_features: channels c of an input (n, c, h, w).
        eps: added to variances.
        momentum: weight of a batch in the running statistics; None: their plain mean.
        affine: learn :math:`\gamma` (1 at the start) and :math:`\beta` (0).
        track_running_stats: keep statistics for inference; they are those of the filtered batches.
        threshold: T, at least 1; infinite: `nn.BatchNorm2d`.
        iterations: how often outliers are looked for (above 1: sigma clipping).
        one_sided: leave out large values only, for inputs that are never negative.
        compensate: divide the variance by what cutting off takes from a Gaussian's (0.9989 at T = 4).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: a threshold below 1; fewer than two values a channel in training.

    The state dict is that of `nn.BatchNorm2d`. Cost: about twice the reductions of batch norm in training, the same at
    inference. Folds to `nn.BatchNorm2d`, which it is in eval mode, and on into a convolution. How the running
    statistics are kept is ours: the authors' code normalises with the test batch's moments.

    Source: Filtered Batch Normalization, Horváth and Al-afandi 2020, arXiv 2010.08251.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        check_maps(input, self.num_features, "FilteredBatchNorm2d")

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self._run(input)

    def folded(self) -> nn.BatchNorm2d:
        """Return the batch norm this is at inference; raises `Stays` without running statistics."""
        norm = self._plain(nn.BatchNorm2d)
        assert isinstance(norm, nn.BatchNorm2d)
        return norm


class FilteredBatchNorm1d(_FilteredBatchNorm):
    """`FilteredBatchNorm2d` for inputs (n, c) or (n, c, length), statistics per feature as in `nn.BatchNorm1d`.

    The authors' variant for vectors pools all features into one mean and variance: `PooledFilteredBatchNorm1d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 3) or input.shape[1] != self.num_features:
            raise UsageError(
                f"FilteredBatchNorm1d: expected an input (n, {self.num_features}) or (n, {self.num_features}, length),"
                f" got {tuple(input.shape)}."
            )

    def forward(self, input: Float[Tensor, "n c *length"]) -> Float[Tensor, "n c *length"]:
        return self._run(input)

    def folded(self) -> nn.BatchNorm1d:
        """Return the batch norm this is at inference; raises `Stays` without running statistics."""
        norm = self._plain(nn.BatchNorm1d)
        assert isinstance(norm, nn.BatchNorm1d)
        return norm


class PooledFilteredBatchNorm1d(nn.Module):
    """Filtered batch norm of vectors with one mean, variance, scale and shift for all features (the authors' form).

    Takes (n, c) for any c. Arguments as in `FilteredBatchNorm2d`. Folds to `nn.BatchNorm1d` of `num_features`.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, *, threshold: float = 4.0
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.norm = FilteredBatchNorm1d(1, eps, momentum, threshold=threshold)

    def forward(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return self.norm(x.reshape(-1, 1)).view_as(x)

    def folded(self) -> nn.BatchNorm1d:
        """Return the batch norm this is at inference: the same numbers for every feature."""
        one = self.norm.folded()
        norm = nn.BatchNorm1d(self.num_features, one.eps, one.momentum).to(one.weight)
        state = {
            name: value.expand(self.num_features).clone() if value.ndim else value
            for name, value in one.state_dict().items()
        }
        norm.load_state_dict(state)
        return norm.eval()


def filter_batch_norm(model: nn.Module, threshold: float = 4.0) -> nn.Module:
    """Replace every `nn.BatchNorm1d` and `nn.BatchNorm2d` of `model` by its filtered form, with all it has learned.

    In place; returns the network, which in eval mode computes what it did.
    """

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        new = {nn.BatchNorm2d: FilteredBatchNorm2d, nn.BatchNorm1d: FilteredBatchNorm1d}.get(type(module))  # type: ignore[call-overload]
        if new is None or not isinstance(module, _BatchNorm):
            return None
        made = new(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            threshold=threshold,
        )
        made._parameters.update(module._parameters)
        made._buffers.update(module._buffers)
        return made.train(module.training)

    return replace_modules(model, choose)


@torch.no_grad()
def outlier_report(model: nn.Module, batches: Iterable[Tensor], threshold: float = 4.0) -> dict[str, float]:
    """Return for each batch norm (filtered or not) the fraction of its inputs beyond `threshold` deviations, 0 to 1.

    The network runs in eval mode and is left as it was. Raises `UsageError` where there is no batch norm.
    """
    outside: dict[str, list[Tensor]] = {}
    hooks = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            outside[name].append(1 - inliers(inputs[0], threshold).float().mean())

        return look

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            outside[name] = []
            hooks.append(module.register_forward_pre_hook(watch(name)))
    if not hooks:
        raise UsageError("outlier_report: the network has no batch norm.")
    with hooked(hooks), in_eval(model):
        for batch in batches:
            model(batch)
    return {name: float(torch.stack(parts).mean()) for name, parts in outside.items() if parts}
