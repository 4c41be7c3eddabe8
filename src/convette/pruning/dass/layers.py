"""Layers whose weights are masked by learned scores: exactly a share of them counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.pruning.sparsity import unstructured_mask


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        # Straight through to all scores: one that is masked out must be able to come back.
        return grads[0] * mask, grads[0] * weight, None


class _Sparse(nn.Module):
    """What the sparse layers share: the scores, the mask they say, and how it is used. Each has a `to_dense`."""

    weight: nn.Parameter
    scores: nn.Parameter

    def _set_up(self, sparsity: float) -> None:
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity = {sparsity}: a share of at least 0 and below 1 is needed.")
        self.sparsity = float(sparsity)
        self.masked, self._fixed = True, None
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        self.reset_scores()

    @torch.no_grad()
    def reset_scores(self) -> None:
        r"""Set :math:`S = \gamma W / \max|W|`, :math:`\gamma = \sqrt{6 / fan_{in}}`: the mask is that of magnitude."""
        fan_in = self.weight[0].numel()
        self.scores.copy_(self.weight / self.weight.abs().max().clamp_min(1e-12) * (6 / fan_in) ** 0.5)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the mask: the largest scores by size, ``round((1 - sparsity) * n)`` of them, ties by index."""
        return self._fixed if self._fixed is not None else unstructured_mask(self.scores.abs(), self.sparsity)

    def sparse_weight(self) -> Tensor:
        """Return the weight as it counts."""
        if not self.masked or self.sparsity == 0:
            return self.weight
        return _Masked.apply(self.weight, self.scores, self.mask())  # type: ignore[return-value]


class SparseConv2d(_Sparse, nn.Conv2d):
    r"""A convolution of which the share `sparsity` of the weights is masked: ``conv(x, W * M(S))``.

    .. math:: M = \mathrm{top}_{1-\rho}(|S|), \qquad
        \frac{\partial L}{\partial S} = \frac{\partial L}{\partial (W M)}\, W, \qquad
        \frac{\partial L}{\partial W} = \frac{\partial L}{\partial (W M)}\, M

    Other arguments as ``nn.Conv2d``. ``masked = False`` switches the mask off. Depthwise weights are best left dense.
    Doubles the parameter memory while training; `to_dense` is exact. Raises `UsageError` for a share out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        sparsity: float = 0.9,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._set_up(sparsity)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with what the mask leaves."""
        return self._conv_forward(input, self.sparse_weight(), self.bias)

    def to_dense(self) -> nn.Conv2d:
        """Return the plain convolution with the masked weights at zero."""
        bias = self.bias is not None
        args = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        dense = nn.Conv2d(*args, groups=self.groups, bias=bias)  # type: ignore[arg-type]
        return _filled(dense, self)


class SparseLinear(_Sparse, nn.Linear):
    """A linear layer of which the share `sparsity` of the weights is masked; see `SparseConv2d`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float = 0.9) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._set_up(sparsity)

    def forward(self, input: Tensor) -> Tensor:
        """Map by what the mask leaves."""
        return F.linear(input, self.sparse_weight(), self.bias)

    def to_dense(self) -> nn.Linear:
        """Return the plain layer with the masked weights at zero."""
        return _filled(nn.Linear(self.in_features, self.out_features, self.bias is not None), self)


@torch.no_grad()
def _filled(dense: Any, sparse: Any) -> Any:
    dense.weight.copy_(sparse.sparse_weight())
    if sparse.bias is not None:
        dense.bias.copy_(sparse.bias)
    return dense.train(sparse.training)


def sparse_modules(model: nn.Module) -> list[Any]:
    """Return the sparse layers of `model`."""
    return [module for module in model.modules() if isinstance(module, SparseConv2d | SparseLinear)]


@contextmanager
def masks_off(model: nn.Module) -> Iterator[None]:
    """Run `model` dense (phase A of the search)."""
    layers = sparse_modules(model)
    before = [layer.masked for layer in layers]
    for layer in layers:
        layer.masked = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.masked = flag


@contextmanager
def masks_fixed(model: nn.Module) -> Iterator[None]:
    """Hold the masks as they are, whatever the scores do (phase C)."""
    layers = sparse_modules(model)
    for layer in layers:
        layer._fixed = layer.mask()
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed = None


def to_sparse(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """Put sparse layers in the place of convolutions (depthwise aside) and linears, in place; magnitude for a start."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.weight.shape[1] > 1:
                given: dict[str, Any] = {
                    name: getattr(child, name) for name in ("stride", "padding", "dilation", "groups")
                }
                kernel: Any = child.kernel_size
                new: Any = SparseConv2d(
                    child.in_channels,
                    child.out_channels,
                    kernel,
                    bias=child.bias is not None,
                    sparsity=sparsity,
                    **given,
                )
            elif type(child) is nn.Linear:
                new = SparseLinear(child.in_features, child.out_features, child.bias is not None, sparsity=sparsity)
            else:
                continue
            new.weight, new.bias = child.weight, child.bias
            new.reset_scores()
            setattr(parent, name, new.train(child.training))
    return model
