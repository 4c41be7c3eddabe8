"""Hierarchical group sparse regularisation: kernels within channels (Mitsuno and Kurita, arXiv 2011.02389, 2004.04394).

The penalties and their weights follow the authors' code; which filters go afterwards is the criterion `loss_increase`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer

BASES, OUTERS, GROUPINGS = ("group_lasso", "exclusive", "half"), ("flat", "sqrt", "square"), ("feature", "neuron")
_EPS = 1e-12


class HierarchicalGroupSparsity(Method):
    r"""Train with a penalty that empties whole input channels of convolutions, kernel by kernel.

    .. math:: L = L_{task} + \rho \lambda \sum_l R(W_l) + (1 - \rho) \lambda \sum_l \lVert W_l \rVert_1

    with R of `hierarchical_group_penalty`, over all plain convolutions except those that only change the resolution of
    a skip (1x1 with stride) and the first one, whose inputs are the image. Prune with ``criterion="loss_increase"``
    afterwards (``candidates=0.3`` measures only what the penalty has emptied) and retrain without it.

    - `strength` (lambda, default 1e-3), `mix` (rho, 0.5): as published, for narrow nets (8 to 64 channels).
    - `base`, `outer`, `grouping`: see `hierarchical_group_penalty`; the default is the authors' best.
    - `normalise`: divide each layer's term by its channels (square) or their root (sqrt): one `strength` for all.
    - `first`: penalise the first convolution too. `exclude`: names of modules to leave out.

    Adds the loss terms ``"hierarchical_group"`` and ``"weight_l1"``. Costs one pass over the weights a step, nothing at
    inference. Raises `UsageError` for an unknown choice or a network without such convolutions.
    """

    name = "hierarchical_group_sparsity"
    events = frozenset({Event.AFTER_LOSS})

    def __init__(
        self,
        strength: float | int = 1e-3,
        mix: float | int = 0.5,
        base: str = "half",
        outer: str = "square",
        grouping: str = "feature",
        *,
        normalise: bool = False,
        first: bool = False,
        exclude: Sequence[str] = (),
    ) -> None:
        if strength < 0 or not 0 <= mix <= 1:
            raise UsageError(f"{self.name}: strength={strength}, mix={mix}; at least 0 and a share in 0..1 are needed.")
        _check_choices(base, outer, grouping)
        self.strength, self.mix, self.normalise = strength, mix, normalise
        self.base, self.outer, self.grouping = base, outer, grouping
        self.first, self.exclude = first, tuple(exclude)

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Add both terms to the loss."""
        terms, magnitude = [], []
        for weight in penalised_weights(trainer.state.model, first=self.first, exclude=self.exclude).values():
            term = hierarchical_group_penalty(weight, self.base, self.outer, self.grouping)
            terms.append(term / self._scale(weight))
            magnitude.append(weight.float().abs().sum())
        trainer.state.losses.add("hierarchical_group", torch.stack(terms).sum(), self.strength * self.mix)
        trainer.state.losses.add("weight_l1", torch.stack(magnitude).sum(), self.strength * (1 - self.mix))

    def _scale(self, weight: Tensor) -> float:
        channels = weight.shape[0] if self.grouping == "feature" else weight.shape[1]
        if not self.normalise or self.outer == "flat":
            return 1.0
        return float(channels) if self.outer == "square" else float(channels) ** 0.5


def hierarchical_group_penalty(
    weight: Float[Tensor, "f c *k"], base: str = "half", outer: str = "square", grouping: str = "feature"
) -> Float[Tensor, ""]:
    r"""Return the penalty of one convolution, in float32 or better.

    With kernel norms :math:`u_{fc} = \lVert W_{fc} \rVert_2` and :math:`v_{fc} = \lVert W_{fc} \rVert_1`, for
    ``grouping="feature"`` (sums over the filters f that read input channel c; "neuron": f and c swapped):

    | `base` | `outer` "flat" | "sqrt" | "square" |
    |---|---|---|---|
    | "group_lasso" | sum_c sqrt(sum_f u^2) | sum_c sqrt(sum_f u) | sum_c (sum_f u)^2 |
    | "exclusive" | sum_c (sum_f v)^2 | sum_c sqrt(sum_f v^2) | sum_c (sum_f v^2)^2 |
    | "half" | sum_c sqrt(sum_f v) | sum_c sqrt(sum_f sqrt(v)) | sum_c (sum_f sqrt(v))^2 |

    The gradient is finite everywhere, 0 at a kernel of zeros. "exclusive" with "square" is of degree 4: it needs a much
    larger strength. Raises `UsageError` for an unknown choice. Source: arXiv 2004.04394.
    """
    _check_choices(base, outer, grouping)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    kernels = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
    norms = torch.linalg.vector_norm(kernels, dim=2) if base == "group_lasso" else kernels.abs().sum(dim=2)
    norms = norms if grouping == "feature" else norms.T
    if base == "group_lasso":
        inner = (norms**2 if outer == "flat" else norms).sum(dim=0)
    elif base == "exclusive":
        inner = (norms if outer == "flat" else norms**2).sum(dim=0)
    else:
        inner = (norms if outer == "flat" else _root(norms)).sum(dim=0)
    squared = outer == "square" or (base == "exclusive" and outer == "flat")
    return (inner**2 if squared else _root(inner)).sum()


def penalised_weights(model: nn.Module, *, first: bool = False, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights of the convolutions that are penalised, by module name; `UsageError` if there is none."""
    plain = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1 and name not in exclude
    }
    if not first and plain:
        plain.pop(next(iter(plain)))
    modules = dict(model.named_modules())
    found = {name: weight for name, weight in plain.items() if not _only_resolution(modules[name])}
    if not found:
        raise UsageError("hierarchical_group_sparsity: the network has no convolution to penalise.")
    return found


def silent_columns(model: nn.Module, threshold: float = 1e-3) -> float:
    """Return the share of input channels of the penalised convolutions whose weights all lie below `threshold`."""
    silent = total = 0
    for weight in penalised_weights(model).values():
        largest = weight.detach().abs().transpose(0, 1).flatten(1).amax(dim=1)
        silent, total = silent + int((largest < threshold).sum()), total + len(largest)
    return silent / total


def _only_resolution(module: nn.Module) -> bool:
    return max(module.kernel_size) == 1 and max(module.stride) > 1  # type: ignore[arg-type]


def _root(values: Tensor) -> Tensor:
    return values.clamp_min(_EPS).sqrt()


def _check_choices(base: str, outer: str, grouping: str) -> None:
    for option, value, known in (("base", base, BASES), ("outer", outer, OUTERS), ("grouping", grouping, GROUPINGS)):
        if value not in known:
            raise UsageError(f"hierarchical_group_sparsity: {option}={value!r} is unknown.{did_you_mean(value, known)}")
