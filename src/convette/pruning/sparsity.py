"""Sparse weights: unstructured and N:M patterns that stay through training, saving and loading.

A mask is not a thing of its own in a file: a weight that is exactly zero is masked. So a sparse network is an ordinary
one, any engine runs it, `masks_of` finds the masks again after loading, and `KeepSparsity` holds them while training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convette.errors import StructureError, UsageError
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer

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


def masks_of(model: nn.Module, *, least: float | int = 0.05) -> dict[str, Tensor]:
    """Return the masks that the zeros of `model` say: of every weight of which at least the share `least` is zero."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            mask = parameter.detach() != 0
            if float((~mask).float().mean()) >= least:
                found[name] = mask
    return found


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


class KeepSparsity(Method):
    """Hold masks while training: what is zero stays zero, whatever optimiser, momentum and weight decay do.

    `masks` None: those that the zeros of the network say (`masks_of`). Masks follow edits of the structure. Costs a
    masked fill a step. Raises `UsageError` at the start for a network without zeros.
    """

    name = "keep_sparsity"
    order = 50
    events = frozenset({Event.SETUP, Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED})

    def __init__(self, masks: Masks | None = None) -> None:
        self.masks: dict[str, Tensor] = dict(masks or {})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Take the masks up, hold them, follow edits."""
        model = trainer.state.model
        if event is Event.STRUCTURE_CHANGED:
            self._follow(trainer)
            return
        if event is Event.SETUP and not self.masks:
            self.masks = self._at_first(model)
        apply_masks(model, self.masks)
        if trainer.state.ema is not None:
            apply_masks(trainer.state.ema.module, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"masks": {name: mask.cpu() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.masks = dict(state["masks"])

    def _at_first(self, model: nn.Module) -> dict[str, Tensor]:
        masks = masks_of(model)
        if not masks:
            raise UsageError(f"{self.name}: no weight of this network is zero; give masks, or sparsify it first.")
        return masks

    def _follow(self, trainer: "Trainer") -> None:
        for name, change in trainer.state.change.parameters.items():
            if name not in self.masks:
                continue
            mask = self.masks.pop(name)
            if change.new is None:
                continue
            for dim, kept in change.kept.items():
                if int(kept.min()) < 0:
                    mask = None
                    break
                mask = mask.index_select(dim, kept.to(mask.device))
            if mask is not None and mask.shape == change.new.shape:
                self.masks[name] = mask


class GradualSparsity(KeepSparsity):
    r"""Make weights sparse during the training, along the cubic curve of Zhu and Gupta, and hold the last masks.

    .. math:: \rho_j = \rho\, \bigl(1 - (1 - j / n)^3\bigr)

    after moment j of `times` = n, evenly spaced between the shares `begin` and `end` of the training; the masks are
    taken anew at each, so that a weight may come back until the last. ``pattern="N:M"`` goes from (M-1):M down to N:M,
    one a moment (`times` is then M - N). Other choices as `make_masks`. Source: Zhu and Gupta, To Prune, or Not to
    Prune, arXiv 1710.01878; N:M: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """

    name = "gradual_sparsity"
    events = frozenset({Event.BATCH_START, Event.AFTER_OPTIMIZER_STEP, Event.STRUCTURE_CHANGED})

    def __init__(
        self,
        sparsity: float | int = 0.9,
        *,
        pattern: str = "unstructured",
        scope: str = "global",
        exclude: Sequence[str] = (),
        begin: float = 0.1,
        end: float = 0.7,
        times: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= begin <= end <= 1 or times < 1:
            raise UsageError(
                f"gradual sparsity: begin={begin}, end={end}, times={times} is no schedule; 0<=begin<=end<=1."
            )
        if not 0 < sparsity < 1:
            raise UsageError(f"gradual sparsity: sparsity = {sparsity} must be between 0 and 1.")
        self.shape = parse_pattern(pattern)
        self.sparsity, self.scope, self.exclude = float(sparsity), scope, tuple(exclude)
        self.begin, self.end = begin, end
        self.times = self.shape[1] - self.shape[0] if self.shape else times
        self.done = 0

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Take new masks where some are due, hold them."""
        if event is not Event.BATCH_START:
            if self.masks:
                super().apply(event, trainer)
            return
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        due = sum(trainer.state.clock.step >= self._moment(number, total) for number in range(self.times))
        if due > self.done:
            self.done = due
            self.masks = self._masks(trainer.state.model)
            apply_masks(trainer.state.model, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and how far the schedule is."""
        return {**super().state_dict(), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state)
        self.done = int(state["done"])

    def _moment(self, number: int, total: int) -> int:
        share = self.begin + (self.end - self.begin) * number / max(1, self.times - 1)
        return min(round(share * total), total - 1)

    def _masks(self, model: nn.Module) -> dict[str, Tensor]:
        if self.shape is not None:
            n, m = self.shape
            return make_masks(model, pattern=f"{max(n, m - self.done)}:{m}", exclude=self.exclude)
        share = 1 - (1 - self.done / self.times) ** 3
        return make_masks(model, self.sparsity * share, scope=self.scope, exclude=self.exclude)
