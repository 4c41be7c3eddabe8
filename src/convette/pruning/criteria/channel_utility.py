"""Channel utility: the Taylor saliency of every image, without cancelling (Shen et al., arXiv 2007.01486)."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import sample_saliencies
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def channel_utility(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "max",
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    r"""Score units by the mean size of each image's first-order loss change.

    .. math:: v_u = \frac1N \sum_n \Bigl| \sum_{r,h,w} x_{n,r,u,h,w} \frac{\partial L_n}{\partial x_{n,r,u,h,w}} \Bigr|,
        \qquad s_u = \frac{v_u}{\max_v v_v}

    x what the readers r of unit u read. `taylor` takes the absolute value a batch, this one an image, so that a unit
    that helps some images and hurts others counts. `normalise` divides by the group's "max" (default), "mean", or
    nothing. `DynamicChannelPropagation` gathers the same during training.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for scores that are not finite. Costs a forward and backward pass a batch. Source: arXiv 2007.01486.
    """
    check_values("criterion channel_utility", channel_utility, normalise=normalise)
    totals: dict[str, Tensor] = {}
    images = 0
    for found in sample_saliencies(model, graph, calibration, loss, "channel_utility"):
        images += len(next(iter(found.values())))
        for name, value in found.items():
            size = value.double().abs().sum(dim=0)
            totals[name] = totals[name] + size if name in totals else size
    scores = {name: normalised(total / images, normalise) for name, total in totals.items()}
    return finite_scores(scores, "channel_utility", graph)
