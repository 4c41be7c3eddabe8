"""The arms of the pruning table: what is crossed with what, and what an arm is called."""

from typing import Any

from convette.pruning import CRITERIA

SPEEDUPS = (2.0, 2.5, 4.0)
RECOVERIES = ("none", "least_squares", "distilled")
# What `convette prune` does by itself: redistribution, then training. For the criteria that are asked for.
BOTH = "both"
SHOWN = {
    "none": "no recovery",
    "least_squares": "least squares",
    "distilled": "3 epochs distilled",
    BOTH: "least squares, then distilled",
}
# What each takes on a network of a few hundred channels; everything else as it comes.
OPTIONS: dict[str, dict[str, Any]] = {"trajectory": {"images": 32}, "blend": {"generations": 4, "population": 10}}
THEIRS = ("tp_l1", "tp_l2", "tp_lamp", "tp_geometric_median", "tp_bn_scale", "tp_taylor", "tp_hessian", "tp_random")
# Ours with the freedom Torch-Pruning has here: inner layers only, residual streams whole.
INNER = tuple(f"inner_{n}" for n in ("l1", "geometric_median", "activation_mean", "taylor", "linear_redundancy"))
ARMS = [*CRITERIA, *INNER, *THEIRS]
DRAWN = {"random": 3, "tp_random": 3}


def key(network: str, criterion: str, speedup: float, recovery: str, seed: int) -> str:
    return f"{network} {criterion} {speedup:g}x {recovery} {seed}"
