"""A policy over the shares that groups keep, learned from the loss of the cut networks it proposes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.pruning._options import check_values
from convette.pruning._reinforce import Reinforce
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import WidthRules, build_ladders
from convette.pruning.allocation._scaling import scaled_rungs
from convette.pruning.allocation._search import absolute_limits, selection_of
from convette.pruning.allocation.global_ranking import global_ranking
from convette.surgery import ChannelGraph


def policy_gradient(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[[Mapping[str, Tensor]], float] | None = None,
    rollouts: Annotated[int, Field(ge=2)] = 6,
    updates: Annotated[int, Field(ge=0)] = 10,
    deviation: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3,
    final_deviation: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
    policy: Literal["shares", "scores"] = "shares",
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Learn the importance of each group by REINFORCE: a normal policy over logarithms of shares, rewarded by -loss.

    .. math:: x \sim N(\theta, \sigma^2 I), \quad C'_g = \mathrm{round}(t\, e^{x_g} C_g), \quad R = -L(K)

    with the factor t that meets the limits exactly. :math:`\theta` starts at equal shares. The cut network is not
    trained: what is rewarded is what is left at once. The best selection seen is returned, the policy's mean among
    them; the first one tried is that of equal shares.

    ``policy="scores"`` learns importances instead, as the paper has it: the scores of a group, divided by its largest,
    times :math:`e^{x_g}`, ranked over the whole network by one threshold; :math:`\theta = 0` is `global_ranking` of the
    divided scores. `deviation` is :math:`\sigma`, falling to `final_deviation` over the updates (None: constant).

    Returns the kept units of every group that loses some; the same for the same `seed`. Raises `BudgetError` with the
    smallest reachable cost, `UsageError` without `loss` or for options out of range (`rollouts` of an update: at least
    2). Costs at most ``rollouts * updates + 2`` losses. Source: the budget allocation of Hou and Kung, A Discriminant
    Information Approach to Deep Neural Network Pruning, ICPR 2020 (reconstructed).
    """
    if loss is None:
        raise UsageError("allocation policy_gradient measures the loss: give a data set, or use global or uniform.")
    options = {
        "rollouts": rollouts,
        "updates": updates,
        "deviation": deviation,
        "final_deviation": final_deviation,
        "policy": policy,
        "learning_rate": learning_rate,
    }
    check_values("allocation policy_gradient", policy_gradient, **options)
    ladders = build_ladders(scores, graph, rules)
    limits = absolute_limits(limit)
    sizes = {ladder.name: ladder.size for ladder in ladders}
    seen: dict[tuple[int, ...], float] = {}

    def rungs_of(x: Tensor) -> dict[str, int]:
        factors = {ladder.name: float(np.exp(value)) for ladder, value in zip(ladders, x.tolist(), strict=True)}
        if policy == "shares":
            return scaled_rungs(ladders, factors, sizes, limits, width_cost)
        selection = global_ranking(weighted_scores(scores, factors), graph, width_cost, limits, rules=rules)
        return {ladder.name: ladder.rung_of(selection) for ladder in ladders}

    def price(x: Tensor) -> float:
        rungs = rungs_of(x)
        key = tuple(rungs[ladder.name] for ladder in ladders)
        if key not in seen:
            value = float(loss(selection_of(ladders, rungs)))
            seen[key] = value if np.isfinite(value) else float("inf")
        return seen[key]

    mean = torch.zeros(len(ladders), requires_grad=True)
    learner = Reinforce([mean], learning_rate)
    generator = torch.Generator().manual_seed(seed)
    first = price(mean.detach())
    if all(rung == len(ladder.widths) - 1 for rung, ladder in zip(next(iter(seen)), ladders, strict=True)):
        return {}
    last = deviation if final_deviation is None else final_deviation
    for update in range(updates):
        spread = deviation + (last - deviation) * update / max(1, updates - 1)
        samples = [mean.detach() + spread * torch.randn(len(ladders), generator=generator) for _ in range(rollouts)]
        # A loss that overflows must not become a gradient that does.
        rewards = [-min(price(x), 10 * abs(first) + 10) for x in samples]
        logs = [-((x - mean) ** 2).sum() / (2 * spread**2) for x in samples]
        learner.step(logs, rewards)
    price(mean.detach())
    best = min(seen, key=lambda rungs: seen[rungs])
    return selection_of(ladders, dict(zip(sizes, best, strict=True)))


def weighted_scores(scores: Scores, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the scores of each group divided by its largest and multiplied by its factor (1 where it has none)."""
    return {
        name: factors.get(name, 1.0) * score / score.abs().amax().clamp_min(1e-30) if len(score) else score
        for name, score in scores.items()
    }
