"""Norm loss: pull the norm of every filter towards one, instead of weight decay (Georgiou et al. 2021)."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from convette.errors import UsageError
from convette.layers.normalization.weight_align import WAConv2d


class NormLossWarning(UserWarning):
    """Norm loss has no effect on some layer."""


def _filters(module: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight` as (filters, entries); for a transposed convolution outputs are behind the groups."""
    if isinstance(module, _ConvTransposeNd):
        parts = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return parts.flatten(0, 1).flatten(1)
    return weight.flatten(1)


def regularised_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the layers norm loss acts on: convolutions and linear layers with a weight of their own, by name.

    `exclude` names modules to leave out, with all inside. Layers whose weight is normalised anyway (WeightAlign and
    other parametrizations) are left out with a warning: the norm of their raw weight means nothing.
    """
    known = dict(model.named_modules())
    for name in exclude:
        if name not in known:
            raise UsageError(f"norm loss: exclude names {name!r}, which the network does not have.")
    found, inert = {}, []
    for name, module in known.items():
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        if any(name == other or name.startswith(f"{other}.") for other in exclude):
            continue
        if isinstance(module, WAConv2d) or parametrize.is_parametrized(module, "weight"):
            inert.append(name)
        else:
            found[name] = module
    if inert:
        warnings.warn(
            f"norm loss leaves out {len(inert)} layers with parametrized weights ({inert[0]} ...).",
            NormLossWarning,
            stacklevel=3,
        )
    return found


def _norms(layers: dict[str, nn.Module]) -> Iterator[Tensor]:
    for module in layers.values():
        weight = module.weight
        assert isinstance(weight, Tensor)
        full = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        # vector_norm has slope 0 at 0, a square root of squares would have none.
        yield torch.linalg.vector_norm(_filters(module, full), dim=1)


def norm_loss(model: nn.Module, exclude: Sequence[str] = ()) -> Tensor:
    r"""Return the norm loss of all convolutions and linear layers, a scalar summed over filters, not averaged.

    .. math:: L = \sum_l \sum_o (1 - \lVert w_{l,o} \rVert_2)^2

    with one filter for each output channel. Its gradient, :math:`2 (1 - 1 / \lVert w \rVert) w`, changes lengths only.
    """
    return _total(regularised_layers(model, exclude))


def _total(layers: dict[str, nn.Module]) -> Tensor:
    parts = [(1 - norms).square().sum() for norms in _norms(layers)]
    if not parts:
        raise UsageError("norm loss: the network has no convolution or linear layer to act on.")
    return torch.stack(parts).sum()


@dataclass(frozen=True)
class FilterNorms:
    """Mean, smallest and largest filter norm of a layer."""

    mean: float
    smallest: float
    largest: float


class NormLoss:
    """`norm_loss` of a network as a loss term (call it) or as a decoupled step (`step`), which replace weight decay.

    Args:
        model: its convolutions and linear layers are looked up once; make another after an edit of its structure.
        weight: lambda: 1e-2 as a loss with SGD, 1e-4 to 6e-4 for the decoupled step of Adam-like optimisers.
        exclude: names of modules to leave out, for instance the classifier where unit rows cap its logits.

    Set the weight decay of these weights to 0: both together pull to a norm below 1. Ranking filters by their norm
    (pruning by L1 or L2) means nothing afterwards; use batch norm scales, Taylor or activations.

    As a loss it enters the momentum of the optimiser, decoupled it does not; without momentum both are the same.
    Cost: one pass over the weights a step; nothing at inference, nothing to fold.

    Source: Norm Loss: An efficient yet effective regularization method for deep neural networks, Georgiou et al. 2021,
    arXiv 2103.06583.
    """

    def __init__(self, model: nn.Module, weight: float = 1e-2, exclude: Sequence[str] = ()) -> None:
        if not weight >= 0:
            raise UsageError(f"norm loss: weight = {weight!r} must be 0 or more.")
        self.weight = weight
        self.layers = regularised_layers(model, exclude)

    def __call__(self) -> Tensor:
        """Return the weighted loss."""
        return self.weight * _total(self.layers)

    @torch.no_grad()
    def step(self, learning_rate: float, eps: float = 1e-8) -> None:
        """Move the weights: ``w *= 1 - 2 lr lambda (1 - 1 / (|w| + eps))``; before or after the optimiser's step."""
        for module, norms in zip(self.layers.values(), _norms(self.layers), strict=True):
            weight = module.weight
            assert isinstance(weight, Tensor)
            factor = 1 - 2 * learning_rate * self.weight * (1 - 1 / (norms + eps))
            # A filter of zeros has no direction to grow in.
            factor = torch.where(norms > 0, factor, 1.0).to(weight.dtype)
            if isinstance(module, _ConvTransposeNd):
                factor = factor.view(module.groups, 1, -1, *[1] * (weight.ndim - 2))
                weight.copy_((weight.unflatten(0, (module.groups, -1)) * factor).flatten(0, 1))
            else:
                weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))

    @torch.no_grad()
    def report(self) -> dict[str, FilterNorms]:
        """Return the filter norms of each layer."""
        return {
            name: FilterNorms(float(norms.mean()), float(norms.min()), float(norms.max()))
            for name, norms in zip(self.layers, _norms(self.layers), strict=True)
        }
