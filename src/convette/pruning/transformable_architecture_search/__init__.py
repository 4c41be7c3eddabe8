"""TAS: widths and depths of a residual network are searched by gradient, then the found shape is trained and taught.

Network Pruning via Transformable Architecture Search, X. Dong and Y. Yang, NeurIPS 2019, arXiv 1905.09717. `search`
runs a supernet whose every convolution mixes two sampled widths; `ShapedResNet` is a residual network of any widths,
what the search ends with; `channel_interpolation`, `two_choices` and `budget_loss` are its parts.
"""

from convette.pruning.transformable_architecture_search.choices import (
    budget_loss,
    channel_interpolation,
    depth_choices,
    depth_probabilities,
    two_choices,
    width_choices,
)
from convette.pruning.transformable_architecture_search.search import TASResult, TASSettings, search
from convette.pruning.transformable_architecture_search.shapes import Shape, ShapedResNet, shape_macs
from convette.pruning.transformable_architecture_search.supernet import SearchResNet

__all__ = [
    "SearchResNet",
    "Shape",
    "ShapedResNet",
    "TASResult",
    "TASSettings",
    "budget_loss",
    "channel_interpolation",
    "depth_choices",
    "depth_probabilities",
    "search",
    "shape_macs",
    "two_choices",
    "width_choices",
]
