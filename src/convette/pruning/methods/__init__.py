"""Training methods of published pruning systems: one file each, bound to the trainer's events.

A recipe names them by slug or class: ``[[method]] name = "hierarchical-group-sparsity"``.
"""

from convette.pruning.methods.dynamic_channel_propagation import DynamicChannelPropagation
from convette.pruning.methods.hierarchical_group_sparsity import (
    HierarchicalGroupSparsity,
    hierarchical_group_penalty,
    silent_columns,
)
from convette.pruning.methods.progressive_gradient_pruning import ProgressiveGradientPruning

__all__ = [
    "DynamicChannelPropagation",
    "HierarchicalGroupSparsity",
    "ProgressiveGradientPruning",
    "hierarchical_group_penalty",
    "silent_columns",
]
