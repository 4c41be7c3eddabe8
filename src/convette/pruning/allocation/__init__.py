"""Allocations: which units go so that the cost meets a limit. One file each; any of them goes with any criterion.

An allocation is a function ``(scores, graph, width_cost, limit, *, rules=None, loss=None) -> selection``. `ALLOCATIONS`
maps the names that recipes use to the functions. `limit` is one absolute limit on MACs, parameters or size, or several.
"""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from convette.errors import UsageError, did_you_mean
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation.exact import exact
from convette.pruning.allocation.global_ranking import global_ranking
from convette.pruning.allocation.per_layer import per_layer
from convette.pruning.allocation.uniform import uniform

__all__ = [
    "ALLOCATIONS",
    "Ladder",
    "WidthRules",
    "build_ladders",
    "exact",
    "find_allocation",
    "global_ranking",
    "per_layer",
    "uniform",
]

ALLOCATIONS: dict[str, str] = {
    "evolution": "convette.pruning.allocation.evolution:evolution",
    "exact": "convette.pruning.allocation.exact:exact",
    "global": "convette.pruning.allocation.global_ranking:global_ranking",
    "opti_cut": "convette.pruning.hardware_aware_filter_pruning:opti_cut",
    "per_layer": "convette.pruning.allocation.per_layer:per_layer",
    "policy_gradient": "convette.pruning.allocation.policy_gradient:policy_gradient",
    "precropping": "convette.pruning.precropping:precropping",
    "transformable_architecture_search": (
        "convette.pruning.transformable_architecture_search.allocation:differentiable_widths"
    ),
    "uniform": "convette.pruning.allocation.uniform:uniform",
}
NEED_DATA = frozenset({"evolution", "per_layer", "policy_gradient", "transformable_architecture_search"})
# Those that need to know how the cost comes about, and so cannot spend a latency that a table predicts.
ONLY_COUNTED = frozenset({"exact"})


def find_allocation(name: str) -> Callable[..., dict[str, Tensor]]:
    """Return the allocation called `name`; `UsageError` if there is none."""
    if name not in ALLOCATIONS:
        raise UsageError(f"allocation {name!r} is unknown.{did_you_mean(name, ALLOCATIONS)}")
    module, symbol = ALLOCATIONS[name].split(":")
    return getattr(import_module(module), symbol)
