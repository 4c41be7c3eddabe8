"""Discriminant information: how well a layer's features tell the classes apart (Hou and Kung, arXiv 2005.13796).

The measure is that of the papers (Al, Hou and Kung, arXiv 1909.10432); the ridge is made relative to the features'
scale, because a fixed one saturates layers with large activations.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import Reader, observe
from convette.surgery import ChannelGraph


def discriminant_information(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    mode: Literal["differential", "leave_one_out", "individual"] = "differential",
    normalise: Literal["relative", "max", "none"] = "relative",
    greedy: float = 0.0,
    ridge: float = 1e-2,
    pool: int = 4,
) -> dict[str, Tensor]:
    r"""Score units by what they add to the discriminant information of what their readers read.

    .. math:: DI(K) = \operatorname{tr}[H K (K + \rho I)^{-1}], \qquad K = \sum_u K_u, \quad K_u = P X_u X_u^\top P

    for n images of L classes: X_u (n x M) the maps of unit u, average-pooled to `pool` x `pool`; P takes out the mean;
    H projects on the class indicators; :math:`\rho` = `ridge` tr(K) / n. DI lies in 0..min(L, n) - 1 and never falls
    when units are added. The score is

    - ``mode="differential"`` (default): the derivative of DI by a weight on K_u, :math:`\rho \lVert X_u^\top P B U
      \rVert_F^2` with :math:`B = (K + \rho I)^{-1}` and :math:`U U^\top = H`: one factorisation a layer;
    - ``mode="leave_one_out"``: DI(K) - DI(K - K_u), exact, one solve a unit;
    - ``mode="individual"``: DI(K_u): blind to duplicates.

    `normalise` makes layers compare: "relative" (default) divides by DI(K), "max" by the layer's largest score, "none"
    leaves them. `greedy` above 0 removes that share of the units, scores the rest again, and so on, so that of two
    equal units one is spared; a unit's score is what it had when its turn came.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data or with a single
    class in it, `StructureError` for activations that are not finite. Use several images a class. Costs one forward
    pass, n^3 a layer, and memory for the pooled maps of all layers. Source: arXiv 2005.13796.
    """
    check_values("criterion discriminant_information", discriminant_information, mode=mode, normalise=normalise)
    if not 0 <= greedy < 1:
        raise UsageError(f"criterion discriminant_information: greedy={greedy}: a share from 0 up to 1 is needed.")
    features, labels = pooled_features(model, graph, calibration, pool, "discriminant_information")
    if labels.unique().numel() < 2:
        raise UsageError("criterion discriminant_information needs calibration images of at least two classes.")
    basis = class_basis(labels)
    scores = {}
    for name, found in features.items():
        blocks = [centred(values.double()) for values in found]
        blocks = [block / block.square().sum().sqrt().clamp_min(1e-12) for block in blocks]
        together = torch.cat(blocks, dim=2)
        score = _greedy(together, basis, mode, ridge, greedy)
        if normalise == "relative":
            score = score / _value(_gram(together), basis, ridge).clamp_min(1e-12)
        elif normalise == "max":
            score = score / score.amax().clamp_min(1e-12)
        scores[name] = score
    return finite_scores(scores, "discriminant_information", graph)


def discriminant_value(features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], ridge: float = 1e-2) -> float:
    r"""Return :math:`DI = \operatorname{tr}[(S + \rho I)^{-1} S_B]` of features (n x d) with their labels.

    S is the total scatter, S_B that between classes, :math:`\rho` = `ridge` tr(S) / n. In 0..(classes - 1): 0 for
    constant features, classes - 1 for class indicators. Computed from n x n matrices.
    """
    units = centred(features.double().unsqueeze(1))
    return float(_value(_gram(units), class_basis(labels), ridge))


def pooled_features(
    model: nn.Module, graph: ChannelGraph, calibration: Iterable[Any] | None, pool: int, criterion: str
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Return for every group what each of its readers reads, (images, units, entries), and the labels of the images.

    Maps are average-pooled to at most `pool` x `pool`.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    labels: list[Tensor] = []

    def see(group: str, reader: Reader, values: Tensor) -> None:
        values = values.float()
        if values.ndim == 5 and max(values.shape[-2:]) > pool:
            size = (min(pool, values.shape[-2]), min(pool, values.shape[-1]))
            values = functional.adaptive_avg_pool2d(values.flatten(1, 2), size).unflatten(1, values.shape[1:3])
        parts.setdefault(group, {}).setdefault(reader.parameter, []).append(values.flatten(2).cpu())

    def finish(outputs: Any, targets: Any) -> None:
        labels.append(torch.as_tensor(targets))

    observe(model, graph, calibration, see, criterion, finish=finish)
    features = {name: [torch.cat(found) for found in readers.values()] for name, readers in parts.items()}
    for name, found in features.items():
        finite_scores({name: found[0].sum(dim=(0, 2))}, criterion, graph)
    return features, torch.cat(labels).cpu()


def class_basis(labels: Tensor) -> Tensor:
    """Return an orthonormal basis (n x (classes - 1)) of the class indicators without their mean."""
    indicators = functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    left, values, _ = torch.linalg.svd(indicators - indicators.mean(dim=0), full_matrices=False)
    return left[:, values > 1e-9]


def centred(values: Tensor) -> Tensor:
    """Take the mean over images (the first dimension) out."""
    return values - values.mean(dim=0)


def _gram(units: Tensor) -> Tensor:
    flat = units.flatten(1)
    return flat @ flat.T


def _damped(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    rho = (ridge * gram.trace() / len(gram)).clamp_min(1e-30)
    return torch.linalg.cholesky(gram + rho * torch.eye(len(gram), dtype=gram.dtype)), rho


def _value(gram: Tensor, basis: Tensor, ridge: float, rho: Tensor | None = None) -> Tensor:
    """DI = rank(H) - rho tr(U' B U), which keeps its digits for features that tell everything."""
    if not gram.trace() > 0:
        return gram.new_zeros(())
    factor, own = _damped(gram, ridge) if rho is None else (_factor(gram, rho), rho)
    return (basis.shape[1] - own * (basis * torch.cholesky_solve(basis, factor)).sum()).clamp_min(0)


def _factor(gram: Tensor, rho: Tensor) -> Tensor:
    return torch.linalg.cholesky(gram + rho * torch.eye(len(gram), dtype=gram.dtype))


def _scores(units: Tensor, basis: Tensor, mode: str, ridge: float) -> Tensor:
    """Return the scores of units (images, units, entries), centred."""
    gram = _gram(units)
    if not gram.trace() > 0:
        return units.new_zeros(units.shape[1])
    factor, rho = _damped(gram, ridge)
    if mode == "differential":
        seen = torch.cholesky_solve(basis, factor)
        return rho * torch.einsum("num,nl->uml", units, seen).square().sum(dim=(1, 2))
    single = [units[:, unit] @ units[:, unit].T for unit in range(units.shape[1])]
    if mode == "individual":
        return torch.stack([_value(one, basis, ridge) for one in single])
    whole = _value(gram, basis, ridge, rho)
    return torch.stack([(whole - _value(gram - one, basis, ridge, rho)).clamp_min(0) for one in single])


def _greedy(units: Tensor, basis: Tensor, mode: str, ridge: float, share: float) -> Tensor:
    if not share:
        return _scores(units, basis, mode, ridge)
    alive = torch.arange(units.shape[1])
    scores, highest = torch.zeros(units.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    while len(alive):
        now = _scores(units[:, alive], basis, mode, ridge)
        order = now.argsort(stable=True)
        turn = order[: max(1, round(share * units.shape[1]))]
        # Later turns never score less: the order of removal is the order of the scores.
        scores[alive[turn]] = torch.maximum(now[turn], highest)
        highest = torch.maximum(highest, now[turn].amax())
        alive = alive[order[len(turn) :].sort().values]
    return scores
