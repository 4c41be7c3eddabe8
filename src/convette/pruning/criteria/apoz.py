"""Average percentage of zeros: how often a unit says anything."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import Reader, observe
from convette.surgery import ChannelGraph


def apoz(
    model: nn.Module, graph: ChannelGraph, calibration: Iterable[Any] | None = None, *, threshold: float = 0.0
) -> dict[str, Tensor]:
    r"""Score units by the share of their activations that are not zero, 1 - APoZ.

    .. math:: s_u = \frac{1}{N R H W} \sum_{n,r,h,w} [\,|x_{n,r,u,h,w}| > t\,]

    x what the readers r of unit u read (behind norm and activation), t the `threshold`. After activations that are
    never exactly zero (SiLU, GELU) a threshold above 0 is needed for the score to tell units apart.

    Returns one score in 0..1 a unit, CPU float32, larger = keep. Raises `UsageError` without calibration data. Costs a
    forward pass a batch. Source: Hu et al., Network Trimming, arXiv 1607.03250.
    """
    return mean_over_readers(
        model, graph, calibration, "apoz", lambda values: (values.abs() > threshold).float().flatten(2).mean(dim=2)
    )


def mean_over_readers(model, graph, calibration, criterion: str, figure) -> dict[str, Tensor]:
    """Return the mean over images and readers of ``figure(values)``: (images, units, k, *positions) to one a unit."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(group: str, reader: Reader, values: Tensor) -> None:
        # A value that is no number must reach the score, whatever the figure makes of it.
        taint = 0 * values.float().flatten(2).sum(dim=2)
        found = (figure(values.float()) + taint).double().sum(dim=0).cpu()
        totals[group] = totals[group] + found if group in totals else found
        counts[group] = counts.get(group, 0) + values.shape[0]

    observe(model, graph, calibration, see, criterion)
    return finite_scores({name: total / counts[name] for name, total in totals.items()}, criterion, graph)
