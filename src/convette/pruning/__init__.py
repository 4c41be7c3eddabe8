"""Pruning: remove channels until a network fits a budget, and repair it on the way.

Criteria (what a unit is worth), allocations (where the budget is spent) and the schedule (when, and with what recovery)
are independent: any goes with any. `prune` puts them together.
"""

from convette.pruning._measured import measure_latencies
from convette.pruning._units import Scores
from convette.pruning.allocation import (
    ALLOCATIONS,
    WidthRules,
    exact,
    find_allocation,
    global_ranking,
    per_layer,
    uniform,
)
from convette.pruning.criteria import (
    CRITERIA,
    activation_mean,
    activation_rank,
    apoz,
    blend,
    bn_scale,
    channel_utility,
    discriminant_information,
    feature_map_information,
    find_criterion,
    fisher,
    geometric_median,
    grad_change,
    group_norm,
    hessian_trace,
    importance_gates,
    l1,
    l2,
    lamp,
    linear_redundancy,
    loss_increase,
    random,
    score_units,
    second_order,
    taylor,
    trajectory,
)
from convette.pruning.criteria.criteria_blending import Blend, blend_search, criteria_agreement
from convette.pruning.criteria.discriminant_information import discriminant_value
from convette.pruning.criteria.feature_map_information import layer_information
from convette.pruning.in_place_distillation import InPlaceDistillation
from convette.pruning.layer_removal import LayerRemoval, redundant_layers, remove_layers
from convette.pruning.methods.gradual_pruning import GradualPruning
from convette.pruning.recovery import RECOVERY, recalibrate, recover
from convette.pruning.redistribution import Repair, redistribute
from convette.pruning.result import PruneResult, StepRecord
from convette.pruning.schedule import check_budget, prune
from convette.pruning.settings import PruneSettings
from convette.pruning.token_reduction import TokenTrajectory, reduce_tokens, token_trajectory

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "RECOVERY",
    "Blend",
    "GradualPruning",
    "InPlaceDistillation",
    "LayerRemoval",
    "PruneResult",
    "PruneSettings",
    "Repair",
    "Scores",
    "StepRecord",
    "TokenTrajectory",
    "WidthRules",
    "activation_mean",
    "activation_rank",
    "apoz",
    "blend",
    "blend_search",
    "bn_scale",
    "channel_utility",
    "check_budget",
    "criteria_agreement",
    "discriminant_information",
    "discriminant_value",
    "exact",
    "feature_map_information",
    "find_allocation",
    "find_criterion",
    "fisher",
    "geometric_median",
    "global_ranking",
    "grad_change",
    "group_norm",
    "hessian_trace",
    "importance_gates",
    "l1",
    "l2",
    "lamp",
    "layer_information",
    "linear_redundancy",
    "loss_increase",
    "measure_latencies",
    "per_layer",
    "prune",
    "random",
    "recalibrate",
    "recover",
    "redistribute",
    "reduce_tokens",
    "redundant_layers",
    "remove_layers",
    "score_units",
    "second_order",
    "taylor",
    "token_trajectory",
    "trajectory",
    "uniform",
]
