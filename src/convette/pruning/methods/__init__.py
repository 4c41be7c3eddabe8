"""Training methods of published pruning systems: one file each, bound to the trainer's events.

A recipe names them by slug or class: ``[[method]] name = "hierarchical-group-sparsity"``.
"""

from convette.pruning.methods.hierarchical_group_sparsity import (
    HierarchicalGroupSparsity,
    hierarchical_group_penalty,
    silent_columns,
)

__all__ = ["HierarchicalGroupSparsity", "hierarchical_group_penalty", "silent_columns"]
