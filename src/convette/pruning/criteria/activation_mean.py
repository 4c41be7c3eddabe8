"""Mean activation: how loud a unit is."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from convette.pruning._options import check_values
from convette.pruning.criteria.apoz import mean_over_readers
from convette.pruning.criteria.magnitude import normalised
from convette.surgery import ChannelGraph


def activation_mean(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    normalise: Literal["mean", "max", "none"] = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the mean magnitude of their activations.

    .. math:: s_u = \frac{1}{N R H W} \sum_{n,r,h,w} |x_{n,r,u,h,w}|

    x what the readers r of unit u read. `normalise` divides by the group's mean (default), its maximum, or nothing.

    Returns one score a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data, `StructureError`
    for activations that are not finite. Costs one forward pass a batch. Source: Molchanov et al., Pruning Convolutional
    Neural Networks for Resource Efficient Inference, arXiv 1611.06440.
    """
    check_values("criterion activation_mean", activation_mean, normalise=normalise)
    scores = mean_over_readers(
        model, graph, calibration, "activation_mean", lambda values: values.abs().flatten(2).mean(dim=2)
    )
    return {name: normalised(score, normalise) for name, score in scores.items()}
