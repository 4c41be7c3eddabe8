"""Sparse weights: unstructured and N:M patterns that stay through training, saving and loading.

A mask is not a thing of its own in a file: a weight that is exactly zero is masked. So a sparse network is an ordinary
one, any engine runs it, `masks_of` finds the masks again after loading, and
`convette.pruning.methods.KeepSparsity` holds them while training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convette.errors import StructureError, UsageError

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class SparsityReport:
    """What is left: ``nonzero`` of ``total`` weights of the layers that have masks; of each the share that is zero."""

    total: int
    nonzero: int
    layers: Mapping[str, float]

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero."""
        return 1 - self.nonzero / max(1, self.total)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (N, M) of a pattern ``"2:4"``, None for ``"unstructured"``; `UsageError` for anything else."""
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise UsageError(f"sparsity pattern {pattern!r}: unstructured, or N:M such as 2:4 with 0 < N < M, is needed.")
    return int(found[1]), int(found[2])


def sparse_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights that become sparse: of convolutions that are not depthwise, and of linear layers.

    Left dense: the first convolution and the last linear layer or convolution (few weights, much harm), depthwise
    convolutions (nine weights a channel: zeros would delete channels), and modules that match a pattern of `exclude`.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.weight.shape[1] > 1)
    ]
    every = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    ends = {every[0][0], every[-1][0]} if len(every) > 2 else set()
    return {
        f"{name}.weight": module.weight
        for name, module in found
        if name not in ends and not any(fnmatch(name, pattern) for pattern in exclude)
    }


def unstructured_mask(scores: Float[Tensor, " *shape"], sparsity: float | int) -> Bool[Tensor, " *shape"]:
    r"""Return the mask that keeps the :math:`\mathrm{round}((1 - \rho)\, n)` largest of n scores; ties go by index."""
    keep = round((1 - float(sparsity)) * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(descending=True, stable=True)[:keep]] = True
    return mask.view(scores.shape)


def n_m_mask(scores: Float[Tensor, "out ..."], n: int, m: int) -> Bool[Tensor, "out ..."]:
    """Return the mask that keeps the `n` largest of every `m` neighbouring inputs of an output; ties go by index.

    Neighbours are input channels at one place of the kernel, as the engines that run N:M want them. What is left where
    the number of inputs is no multiple of `m` keeps its `n` largest too (all, if there are no more than that).
    """
    by_input = scores.movedim(1, -1) if scores.ndim > 2 else scores
    inputs = by_input.shape[-1]
    padding = -inputs % m
    padded = torch.nn.functional.pad(by_input, (0, padding), value=-torch.inf)
    blocks = padded.reshape(*padded.shape[:-1], -1, m)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    mask = mask.reshape(padded.shape)[..., :inputs]
    return mask.movedim(-1, 1) if scores.ndim > 2 else mask


def make_masks(
    model: nn.Module,
    sparsity: float | int = 0.9,
    *,
    pattern: str = "unstructured",
    scope: str = "global",
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Return masks by weight magnitude: True stays.

    .. math:: M = [\,|w| \text{ among the } (1 - \rho) \text{ largest}\,]

    of the whole network (``scope="global"``), of each layer ("layer"), or of every M neighbours (``pattern="N:M"``,
    where `sparsity` is ignored: it is 1 - N/M). `exclude`: patterns of module names to leave dense, beside those that
    `sparse_layers` leaves. Raises `UsageError` for choices that cannot be, `StructureError` for a network without such
    layers, or weights that are not finite.
    """
    shape = parse_pattern(pattern)
    if scope not in ("global", "layer"):
        raise UsageError(f"sparsity scope {scope!r} is none of 'global', 'layer'.")
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity = {sparsity}: a share of at least 0 and below 1 is needed.")
    weights = {name: weight.detach().abs() for name, weight in sparse_layers(model, exclude).items()}
    if not weights:
        raise StructureError("no layer of this network can be sparse: it has none beside its first and last.")
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise StructureError(f"sparsity: {name} is not finite; look for the step that broke it.")
    if shape is not None:
        return {name: n_m_mask(weight, *shape) for name, weight in weights.items()}
    if scope == "layer":
        return {name: unstructured_mask(weight, sparsity) for name, weight in weights.items()}
    mask = unstructured_mask(torch.cat([weight.flatten() for weight in weights.values()]), sparsity)
    parts = mask.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the masked weights of `model` to zero, in place. Raises `StructureError` for masks of another network."""
    tensors = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in tensors or tensors[name].shape != mask.shape:
            raise StructureError(f"the mask of {name} does not fit this network; make the masks anew.")
        # Not a product: an infinite weight times zero would be no zero.
        tensors[name].masked_fill_(~mask.to(tensors[name].device), 0.0)


def masks_of(model: nn.Module | Mapping[str, Tensor], *, least: float | int = 0.05) -> dict[str, Tensor]:
    """Return the masks that the zeros of `model` say: of every weight of which at least the share `least` is zero.

    `model`: a network, or its tensors by name.
    """
    found = {}
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else model.items():
        if parameter.ndim > 1 and parameter.is_floating_point():
            mask = parameter.detach() != 0
            if float((~mask).float().mean()) >= least:
                found[name] = mask
    return found


def zeros_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of a network that was made sparse: `masks_of` without weights that are zero altogether.

    Such are layers that begin at zero and learn from there, not sparse ones.
    """
    return {name: mask for name, mask in masks_of(model).items() if bool(mask.any())}


def pattern_of(masks: Masks) -> tuple[int, int] | None:
    """Return the pattern (N, M) that all `masks` keep to, M 2, 4 or 8; None if they keep to none.

    It counts where the masks fill it to four fifths: that a few weights happen to lie apart is none.
    """
    if not masks:
        return None
    density = 1 - report(masks).sparsity
    for n, m in ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (3, 8), (4, 8)):
        if 0.8 * n / m <= density <= 1.2 * n / m and all(_keeps_to(mask, n, m) for mask in masks.values()):
            return n, m
    return None


def sparsity_in_words(masks: Masks) -> str:
    """Return what `masks` leave, as ``"50% of the weights of 6 layers are zero (2:4)"``."""
    pattern = pattern_of(masks)
    named = "unstructured" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    layers = f"{len(masks)} layer{'s' * (len(masks) > 1)}"
    return f"{report(masks).sparsity:.0%} of the weights of {layers} are zero ({named})"


def _keeps_to(mask: Tensor, n: int, m: int) -> bool:
    return not bool((mask & ~n_m_mask(mask.float(), n, m)).any())


def sparsify(model: nn.Module, sparsity: float | int = 0.9, **choices: Any) -> SparsityReport:
    """Make the weights of `model` sparse, in place, by `make_masks` with its choices; says what is left."""
    masks = make_masks(model, sparsity, **choices)
    apply_masks(model, masks)
    return report(masks)


def report(masks: Masks) -> SparsityReport:
    """Return how sparse `masks` are."""
    layers = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
    return SparsityReport(
        sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values()), layers
    )
