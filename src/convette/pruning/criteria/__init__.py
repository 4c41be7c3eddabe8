"""Criteria: what a unit is worth. One file each; any of them goes with any allocation and schedule.

A criterion is a function ``(model, graph, calibration=None, **its own options) -> {group name: score per unit}``;
larger scores are kept longer. `CRITERIA` maps the names that recipes use to the functions.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from convette._progress import note
from convette._symbols import load_symbol
from convette.errors import UsageError, did_you_mean
from convette.pruning import _options
from convette.pruning._units import flat_groups
from convette.pruning.criteria.activation_mean import activation_mean
from convette.pruning.criteria.activation_rank import activation_rank
from convette.pruning.criteria.apoz import apoz
from convette.pruning.criteria.bn_scale import bn_scale
from convette.pruning.criteria.channel_utility import channel_utility
from convette.pruning.criteria.criteria_blending import blend
from convette.pruning.criteria.discriminant_information import discriminant_information
from convette.pruning.criteria.feature_map_information import feature_map_information
from convette.pruning.criteria.fisher import fisher
from convette.pruning.criteria.geometric_median import geometric_median
from convette.pruning.criteria.grad_change import grad_change
from convette.pruning.criteria.group_norm import group_norm
from convette.pruning.criteria.hessian_trace import hessian_trace
from convette.pruning.criteria.lamp import lamp
from convette.pruning.criteria.linear_redundancy import linear_redundancy
from convette.pruning.criteria.loss_increase import loss_increase
from convette.pruning.criteria.magnitude import l1, l2
from convette.pruning.criteria.optin import trajectory
from convette.pruning.criteria.random import random
from convette.pruning.criteria.second_order import second_order
from convette.pruning.criteria.slimming_shortcut import importance_gates
from convette.pruning.criteria.taylor import taylor
from convette.surgery import ChannelGraph

__all__ = [
    "CRITERIA",
    "activation_mean",
    "activation_rank",
    "apoz",
    "blend",
    "bn_scale",
    "channel_utility",
    "check_options",
    "discriminant_information",
    "feature_map_information",
    "find_criterion",
    "fisher",
    "geometric_median",
    "grad_change",
    "group_norm",
    "hessian_trace",
    "importance_gates",
    "l1",
    "l2",
    "lamp",
    "linear_redundancy",
    "loss_increase",
    "random",
    "score_units",
    "second_order",
    "taylor",
    "trajectory",
]

_HERE = "convette.pruning.criteria"
CRITERIA: dict[str, str] = {
    "activation_mean": f"{_HERE}.activation_mean:activation_mean",
    "activation_rank": f"{_HERE}.activation_rank:activation_rank",
    "apoz": f"{_HERE}.apoz:apoz",
    "blend": f"{_HERE}.criteria_blending:blend",
    "bn_scale": f"{_HERE}.bn_scale:bn_scale",
    "channel_utility": f"{_HERE}.channel_utility:channel_utility",
    "discriminant_information": f"{_HERE}.discriminant_information:discriminant_information",
    "feature_map_information": f"{_HERE}.feature_map_information:feature_map_information",
    "fisher": f"{_HERE}.fisher:fisher",
    "geometric_median": f"{_HERE}.geometric_median:geometric_median",
    "grad_change": f"{_HERE}.grad_change:grad_change",
    "group_norm": f"{_HERE}.group_norm:group_norm",
    "hessian_trace": f"{_HERE}.hessian_trace:hessian_trace",
    "importance_gates": f"{_HERE}.slimming_shortcut:importance_gates",
    "information_gain": "convette.pruning.hardware_aware_filter_pruning:information_gain",
    "l1": f"{_HERE}.magnitude:l1",
    "l2": f"{_HERE}.magnitude:l2",
    "lamp": f"{_HERE}.lamp:lamp",
    "linear_redundancy": f"{_HERE}.linear_redundancy:linear_redundancy",
    "loss_increase": f"{_HERE}.loss_increase:loss_increase",
    "random": f"{_HERE}.random:random",
    "second_order": f"{_HERE}.second_order:second_order",
    "subsidiary": "convette.pruning.main_subsidiary:subsidiary",
    "taylor": f"{_HERE}.taylor:taylor",
    "trajectory": f"{_HERE}.optin:trajectory",
}
NEED_DATA = frozenset(
    {
        "activation_mean",
        "activation_rank",
        "apoz",
        "blend",
        "channel_utility",
        "discriminant_information",
        "feature_map_information",
        "fisher",
        "grad_change",
        "hessian_trace",
        "importance_gates",
        "information_gain",
        "linear_redundancy",
        "loss_increase",
        "second_order",
        "subsidiary",
        "taylor",
        "trajectory",
    }
)


def find_criterion(name: str) -> Callable[..., dict[str, Tensor]]:
    """Return the criterion called `name`; `UsageError` if there is none."""
    if name not in CRITERIA:
        raise UsageError(f"criterion {name!r} is unknown.{did_you_mean(name, CRITERIA)}")
    return load_symbol(CRITERIA[name])


def score_units(
    name: str,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Score the units of `graph` by the criterion called `name`, with its own `options`.

    `seed` goes to the criteria that draw numbers. Where nothing can be removed there is nothing to score. Raises
    `UsageError` for an unknown name or option, or where the criterion needs data and `calibration` is None;
    `StructureError` for a score that is not finite. Where all units of a group are worth the same a note says so: the
    first ones stay then.
    """
    criterion = find_criterion(name)
    arguments = check_options(name, options or {})
    if not graph.groups:
        return {}
    if "seed" in _options.own_options(criterion):
        arguments.setdefault("seed", seed)
    scores = criterion(model, graph, calibration, **arguments)
    if flat := flat_groups(scores):
        named = ", ".join(flat[:3]) + (f" and {len(flat) - 3} more" if len(flat) > 3 else "")
        note(
            f"criterion {name}: all units of {named} are worth the same, so which of them stay is no choice (the first"
            " do): dead weights, constant activations or too little calibration data; another criterion may tell them"
            " apart"
        )
    return scores


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` as the criterion called `name` takes them.

    Raises `UsageError` if it has not all of them, or for a value of another type.
    """
    return _options.check_options(f"criterion {name}", find_criterion(name), options)
