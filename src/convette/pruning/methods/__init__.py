"""Training methods of published pruning systems: one file each, bound to the trainer's events.

A recipe names them by slug or class: ``[[method]] name = "hierarchical-group-sparsity"``.
"""

from convette.pruning.methods.dass import ScoreMasks
from convette.pruning.methods.dynamic_channel_propagation import DynamicChannelPropagation
from convette.pruning.methods.gradual_pruning import GradualPruning
from convette.pruning.methods.gradual_sparsity import GradualSparsity
from convette.pruning.methods.growing_regularization import GrowingRegularization
from convette.pruning.methods.hierarchical_group_sparsity import (
    HierarchicalGroupSparsity,
    hierarchical_group_penalty,
    silent_columns,
)
from convette.pruning.methods.keep_sparsity import KeepSparsity
from convette.pruning.methods.linear_redundancy import AnnealedRedundancy
from convette.pruning.methods.progressive_gradient_pruning import ProgressiveGradientPruning
from convette.pruning.methods.soft_pruning import SoftPruning

__all__ = [
    "AnnealedRedundancy",
    "DynamicChannelPropagation",
    "GradualPruning",
    "GradualSparsity",
    "GrowingRegularization",
    "HierarchicalGroupSparsity",
    "KeepSparsity",
    "ProgressiveGradientPruning",
    "ScoreMasks",
    "SoftPruning",
    "hierarchical_group_penalty",
    "silent_columns",
]
