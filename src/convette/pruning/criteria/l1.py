"""L1 magnitude of the weights that produce a unit."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from convette.pruning.criteria._magnitude import magnitude
from convette.surgery import ChannelGraph


def l1(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    aggregate: str = "norm",
    normalise: str = "mean",
) -> dict[str, Tensor]:
    r"""Score units by the L1 norm of their producer weights.

    .. math:: n_{m,u} = \sum |w_{m,u}|,\qquad s_u = \frac{a_u}{\operatorname{mean}_v a_v}

    where :math:`w_{m,u}` is the slice of producer weight m (the rows of a convolution or linear layer) that makes unit
    u and :math:`a_u` merges the members m of a group, for instance all the layers that add to one residual stream:

    - ``aggregate="norm"`` (default): the L1 norm of all slices taken as one vector; layers with large weights speak
      louder;
    - ``aggregate="mean"``: the mean of :math:`n_{m,u} / \operatorname{mean}_v n_{m,v}`: every layer has equal say;
    - ``aggregate="max"``: the largest of those: a unit stays if one layer needs it.

    `normalise` divides by the group's mean (default: groups compare by relative size), its maximum, or nothing.
    Biases and batch-norm scales do not count. Groups without producers get no score, which leaves them untouched.

    Returns one score a unit for every scored group, CPU float32, larger = keep; a unit without weights scores 0.
    Raises `StructureError` for a weight that is NaN or infinite, `UsageError` for an unknown option.
    Costs one pass over the weights; needs no data (`calibration` is ignored). Source: Li et al., Pruning Filters for
    Efficient ConvNets, arXiv 1608.08710.
    """
    return magnitude(model, graph, 1, aggregate, normalise)
