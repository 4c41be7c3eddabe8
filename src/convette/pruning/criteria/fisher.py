"""Fisher information of a unit's gate: the second-order cost of removing it, from first derivatives only."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import sample_saliencies
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def fisher(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "none",
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the Fisher information of the gate that would switch them off.

    .. math:: s_u = \frac{1}{2N} \sum_{n=1}^{N} \Bigl(\sum_{r,h,w} x_{n,r,u,h,w}
        \frac{\partial L_n}{\partial x_{n,r,u,h,w}}\Bigr)^2

    over N calibration images, L_n the `loss` of one image, x what the readers r of unit u read. The inner sum is the
    derivative of L_n by a gate on the unit; its mean square is the Fisher (Gauss-Newton) estimate of the gate's second
    derivative, half of which is what removing the unit costs where the network has converged.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for scores that are not finite. Costs a forward and backward pass a batch; memory for what all readers read of one
    batch. Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, arXiv 1801.05787.
    """
    check_values("criterion fisher", fisher, normalise=normalise)
    totals: dict[str, Tensor] = {}
    images = 0
    for found in sample_saliencies(model, graph, calibration, loss, "fisher"):
        images += len(next(iter(found.values())))
        for name, value in found.items():
            square = value.double().square().sum(dim=0)
            totals[name] = totals[name] + square if name in totals else square
    scores = {name: normalised(total / (2 * images), normalise) for name, total in totals.items()}
    return finite_scores(scores, "fisher", graph)
