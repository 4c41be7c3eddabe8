"""Allocations: which units go so that the cost meets a limit. One file each; any of them goes with any criterion.

An allocation is a function ``(scores, graph, width_cost, limit, *, rules=None, loss=None, **its own options) ->
selection``. `ALLOCATIONS` maps the names that recipes use to the functions. `limit` is one absolute limit on MACs,
parameters or size, or several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from convette._symbols import load_symbol
from convette.cost import Limit, WidthCost
from convette.errors import UsageError, did_you_mean
from convette.pruning import _options
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation.exact import exact
from convette.pruning.allocation.global_ranking import global_ranking
from convette.pruning.allocation.per_layer import per_layer
from convette.pruning.allocation.uniform import uniform
from convette.surgery import ChannelGraph

__all__ = [
    "ALLOCATIONS",
    "Ladder",
    "WidthRules",
    "allocate",
    "build_ladders",
    "check_options",
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
# What the run fills in; every other keyword is an option that a recipe may set.
_GIVEN = ("rules", "loss")


def find_allocation(name: str) -> Callable[..., dict[str, Tensor]]:
    """Return the allocation called `name`; `UsageError` if there is none."""
    if name not in ALLOCATIONS:
        raise UsageError(f"allocation {name!r} is unknown.{did_you_mean(name, ALLOCATIONS)}")
    return load_symbol(ALLOCATIONS[name])


def allocate(
    name: str,
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[[Mapping[str, Tensor]], float] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Spend `limit` by the allocation called `name`, with its own `options`; returns the kept units by group.

    `seed` goes to the allocations that draw numbers. Raises `UsageError` for an unknown name or option, and what the
    allocation raises: `BudgetError` where the limit cannot be reached.
    """
    arguments = check_options(name, options or {})
    allocation = find_allocation(name)
    if "seed" in _options.own_options(allocation):
        arguments.setdefault("seed", seed)
    return allocation(scores, graph, width_cost, limit, rules=rules, loss=loss, **arguments)


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` as the allocation called `name` takes them.

    Raises `UsageError` if it has not all of them, or for a value of another type or out of its range.
    """
    return _options.check_options(f"allocation {name}", find_allocation(name), options, _GIVEN)
