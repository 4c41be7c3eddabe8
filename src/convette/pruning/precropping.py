"""PreCrop: structured pruning at initialisation, from layer densities in closed form (arXiv 2203.02549).

Structured Pruning is All You Need for Pruning CNNs at Initialization, Y. Cai and others, 2022. What a pruning mask at
initialisation decides is how dense each layer is, not which weights stay; so the densities are computed, without data
or training, and turned into widths. The allocation `precropping` does that for any network and criterion; `precrop`
makes a fresh, smaller network of an untrained one.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from convette.cost import Budget, Limit, WidthCost, count
from convette.errors import UsageError
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import WidthRules, build_ladders
from convette.pruning.allocation._scaling import scaled_rungs
from convette.pruning.allocation._search import absolute_limits, predicted, selection_of
from convette.pruning.criteria.magnitude import check_choice
from convette.pruning.initial_densities import SOURCES, mask_densities
from convette.surgery import ChannelGraph, apply, trace

Rule = Literal["least_squares", "geometric", "min"]
Source = Literal["synexp", "synflow", "magnitude", "uniform", "erk"]


@dataclass(frozen=True)
class LayerLoad:
    """A layer of the proxy: weights n, MACs m, and the groups that its density is a product of, with exponents.

    A convolution from group a to group b has exponent 1 for both; where several groups lie side by side in its input,
    each has its share of the channels; what cannot change has none.
    """

    name: str
    weights: float
    macs: float
    groups: Mapping[str, float]


def synexp_densities(
    weights: np.ndarray,
    budget: float,
    *,
    macs: np.ndarray | None = None,
    macs_budget: float | None = None,
    least: float = 0.0,
) -> np.ndarray:
    r"""Return the layer densities that keep the most of the expected path score, within the budgets.

    .. math:: \max_p \sum_l \log p_l \quad\text{s.t.}\quad \sum_l n_l p_l \le B,\; \sum_l m_l p_l \le B_m,\; p_l \le 1
        \qquad\Rightarrow\qquad p_l = \min\{1, 1/(\mu n_l + \nu m_l)\}

    With one budget every layer below density 1 keeps the same number of weights :math:`1/\mu`. One
    budget is solved exactly, two by Newton's method on the multipliers. `weights`: n of each layer, `budget`: B; `macs`
    and `macs_budget`: m and B_m. `least`: a density that no layer goes below, against layers of one channel. Raises
    `UsageError` for a budget that is not above 0 or below what `least` leaves. Cost: some hundred vector operations.
    """
    n = np.asarray(weights, dtype=float)
    if not budget > 0 or (macs_budget is not None and not macs_budget > 0):
        raise UsageError("precropping: a budget must be above 0.")
    for name, loads, bound in (("weights", n, budget), ("MACs", macs, macs_budget)):
        if loads is not None and bound is not None and least * float(np.sum(loads)) > bound * (1 + 1e-12):
            raise UsageError(f"precropping: least = {least} keeps more {name} than the budget; lower it.")
    if macs is None or macs_budget is None:
        return _filled(n, budget, least)
    m = np.asarray(macs, dtype=float)
    for mine, bound, other, other_bound in ((n, budget, m, macs_budget), (m, macs_budget, n, budget)):
        p = _filled(mine, bound, least)
        if float(other @ p) <= other_bound * (1 + 1e-12):
            return p
    return _both(n, budget, m, macs_budget, least)


def _both(n: np.ndarray, budget: float, m: np.ndarray, macs_budget: float, least: float) -> np.ndarray:
    """Return the densities where both budgets bind: Newton's method on the dual, in logarithms of the multipliers."""
    from scipy.optimize import least_squares

    def misses(logs: np.ndarray) -> np.ndarray:
        p = np.clip(1.0 / (math.exp(logs[0]) * n + math.exp(logs[1]) * m), least, 1.0)
        return np.array([math.log(float(n @ p) / budget), math.log(float(m @ p) / macs_budget)])

    start = np.log(np.array([0.5 * len(n) / budget, 0.5 * len(n) / macs_budget]))
    found = least_squares(misses, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000)
    p = np.clip(1.0 / (math.exp(found.x[0]) * n + math.exp(found.x[1]) * m), least, 1.0)
    # What the tolerance left over is taken from all alike.
    return p * min(1.0, budget / float(n @ p), macs_budget / float(m @ p))


def _filled(n: np.ndarray, budget: float, least: float) -> np.ndarray:
    if float(n.sum()) <= budget:
        return np.ones_like(n)
    if least:
        low, high = 0.0, float(n.max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if float(n @ np.clip(middle / n, least, 1.0)) > budget else (middle, high)
        return np.clip(low / n, least, 1.0)
    order = np.sort(n)
    # Water-filling, solved exactly: the k smallest layers are whole, the others keep kappa weights each.
    below = np.concatenate([[0.0], np.cumsum(order)])
    for whole in range(len(n)):
        kappa = (budget - below[whole]) / (len(n) - whole)
        if kappa < order[whole]:
            return np.minimum(1.0, kappa / n)
    return np.ones_like(n)


def layer_loads(graph: ChannelGraph) -> list[LayerLoad]:
    """Return the load of every layer with a weight of two or more dimensions, at full width. Costs one counting run."""
    model = graph.model
    macs = {layer.name: float(layer.macs) for layer in count(model, graph.example).layers}
    modules = dict(model.named_modules())
    exponents: dict[str, dict[str, float]] = {}
    for group in graph.groups:
        for member in group.members:
            module, _, leaf = member.parameter.rpartition(".")
            weight = getattr(modules.get(module), leaf, None)
            if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or member.dim > 1:
                continue
            share = member.index.numel() / weight.shape[member.dim]
            entry = exponents.setdefault(module, {})
            entry[group.name] = entry.get(group.name, 0.0) + share
    loads = []
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and macs.get(name):
            loads.append(LayerLoad(name, float(weight.numel()), macs[name], exponents.get(name, {})))
    return loads


def keep_ratios(
    loads: Sequence[LayerLoad], densities: np.ndarray, *, most: float | int = 1.0, rule: str = "least_squares"
) -> dict[str, float]:
    r"""Return the share of its channels that each group keeps, so that the layers come close to their `densities`.

    .. math:: \min_r \sum_l n_l \Bigl(\sum_{d} e_{l,d} \log r_d - \log p_l\Bigr)^2, \quad r_d \le most

    A residual stream is one group with as many votes as it has layers. Layers that no group can change are left out.
    `rule` "geometric" gives each group the geometric mean of the roots that its layers ask for (:math:`\sqrt{p_l}`
    between two groups, :math:`p_l` where one side is fixed), "min" the least of them, which is the cautious form of the
    paper. Raises `UsageError` for another.
    """
    from scipy.optimize import lsq_linear

    check_choice("rule", rule, ("least_squares", "geometric", "min"))

    names = sorted({name for load in loads for name in load.groups})
    moving = [(load, p) for load, p in zip(loads, densities, strict=True) if load.groups]
    if not names or not moving:
        return {}
    if rule != "least_squares":
        asked: dict[str, list[float]] = {}
        for load, p in moving:
            for name in load.groups:
                asked.setdefault(name, []).append(math.log(max(p, 1e-9)) / max(1.0, sum(load.groups.values())))
        meet = min if rule == "min" else (lambda logs: sum(logs) / len(logs))
        return {name: min(float(most), math.exp(meet(logs))) for name, logs in asked.items()}
    rows = np.zeros((len(moving), len(names)))
    for row, (load, _) in enumerate(moving):
        for name, exponent in load.groups.items():
            rows[row, names.index(name)] = exponent
    wanted = np.log(np.maximum(np.array([p for _, p in moving]), 1e-9))
    root = np.sqrt(np.array([load.weights for load, _ in moving]))
    # A little pull to 1 decides what the layers leave open.
    matrix = np.concatenate([rows * root[:, None], 1e-4 * root.mean() * np.eye(len(names))])
    target = np.concatenate([wanted * root, np.zeros(len(names))])
    found = lsq_linear(matrix, target, bounds=(-25.0, math.log(most) + 1e-12))
    return {name: float(math.exp(value)) for name, value in zip(names, found.x, strict=True)}


def precropping(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[..., float] | None = None,
    density: Source = "synexp",
    rule: Rule = "least_squares",
) -> dict[str, Tensor]:
    r"""Give every layer the density that keeps the most of the expected path score, as widths that meet the limit.

    Densities by `synexp_densities`, widths by `keep_ratios`, then one factor t on all of them, the largest that meets
    the limits (by bisection), and a last step up wherever it still fits:

    .. math:: C'_d = \mathrm{round}(t\, r_d\, C_d)

    A limit on parameters or size counts weights, one on MACs counts MACs, both together count as both; a latency table
    counts as MACs. Which units stay says `scores`; how many does not depend on them: at initialisation any criterion
    will do. A budget on parameters starves late, wide layers and hardly lowers MACs: say which one is meant. `density`:
    densities of another kind, see `mask_densities`; `rule`: see `keep_ratios`.

    Returns the kept units of every group that loses some. Raises `BudgetError` with the smallest reachable cost. Costs
    a counting run and about 60 cost predictions; `loss` is not used.
    """
    ladders = build_ladders(scores, graph, rules)
    limits = absolute_limits(limit)
    loads = layer_loads(graph)
    if density == "synexp":
        densities = _densities(loads, limits, width_cost)
    else:
        densities = _of_masks(graph, loads, limits, width_cost, density)
    ratios = keep_ratios(loads, densities, rule=rule)
    sizes = {ladder.name: ladder.size for ladder in ladders}
    rungs = scaled_rungs(ladders, ratios, sizes, limits, width_cost)
    return selection_of(ladders, rungs)


def _of_masks(
    graph: ChannelGraph,
    loads: Sequence[LayerLoad],
    limits: Sequence[Limit],
    width_cost: WidthCost,
    source: str,
    calibration: Iterable[Any] | None = None,
) -> np.ndarray:
    """Return the densities that a mask at initialisation would leave, with the smallest share that `limits` ask for."""
    wholes = {one: max(float(predicted(width_cost, one.metric, {})), 1e-12) for one in limits}
    share = min(1.0, *(float(one.value) / whole for one, whole in wholes.items()))
    found = mask_densities(graph.model, graph.example, share, source, calibration=calibration)
    return np.array([found.get(load.name, 1.0) for load in loads])


def _densities(
    loads: Sequence[LayerLoad],
    limits: Sequence[Limit],
    width_cost: WidthCost,
    *,
    bounded: bool = True,
    least: float = 0.0,
) -> np.ndarray:
    """Return the densities for `limits`, each as a share of the full cost that the layers have to come down to."""
    n, m = np.array([load.weights for load in loads]), np.array([load.macs for load in loads])
    shares = {"weights": float("inf"), "macs": float("inf")}
    for one in limits:
        kind = "weights" if one.metric in ("parameters", "size") else "macs"
        shares[kind] = min(shares[kind], float(one.value) / max(float(predicted(width_cost, one.metric, {})), 1e-12))
    if not bounded:
        n, m = n / max(shares["weights"], 1e-12), m / max(shares["macs"], 1e-12)
        parts = [x / x.sum() for x, share in ((n, shares["weights"]), (m, shares["macs"])) if np.isfinite(share)]
        return 1.0 / (len(n) * np.mean(parts, axis=0))
    if not np.isfinite(shares["macs"]):
        return synexp_densities(n, shares["weights"] * float(n.sum()), least=least)
    if not np.isfinite(shares["weights"]):
        return synexp_densities(m, shares["macs"] * float(m.sum()), least=least)
    bounds = shares["weights"] * float(n.sum()), shares["macs"] * float(m.sum())
    return synexp_densities(n, bounds[0], macs=m, macs_budget=bounds[1], least=least)


@dataclass(frozen=True)
class PreCropped:
    """A fresh network within the budget: widths by group, before and after, and the densities asked of the layers."""

    model: nn.Module
    widths: Mapping[str, tuple[int, int]]
    densities: Mapping[str, float]


def precrop(
    model: nn.Module,
    example: Any,
    budget: Budget | str,
    *,
    reconfigure: bool = False,
    most: float | int = 2.0,
    inner_only: bool = False,
    density: str = "synexp",
    calibration: Iterable[Any] | None = None,
    rule: str = "least_squares",
    least: float | int = 0.0,
    multiple_of: int = 1,
    initialise: bool = True,
    seed: int = 0,
) -> PreCropped:
    """Return a copy of the untrained `model` with the widths of `precropping`, freshly initialised; train it as usual.

    - `reconfigure` (PreConfig): widths may also grow, up to `most` times: the same cost, spent better. The budget is
      then that of the network itself, such as ``"macs<=100%"``.
    - `inner_only`: residual streams (groups written by more than one layer) stay whole.
    - `density`: "synexp" (default, no data), or what a mask at initialisation would leave of each layer:
      `convette.pruning.initial_densities.SOURCES`; "snip" and "grasp" need `calibration` batches. `rule`: how densities
      become widths, see `keep_ratios`. `least`: a density that no layer goes below (synexp only).
    - `initialise`: weights are drawn anew for the new fan-in (each layer's own ``reset_parameters``, by `seed`);
      without it the first channels of the old weights stay.

    The network keeps its origin, with the cut in its log. Raises `BudgetError` for a budget out of reach, `UsageError`
    for one on latency or memory, and for `most` below 1. Costs a trace, a count and a cut.
    """
    if most < 1:
        raise UsageError(f"precropping: most = {most} must be at least 1.")
    check_choice("density", density, ("synexp", *SOURCES))
    if reconfigure and density != "synexp":
        raise UsageError("precropping: reconfigure goes by densities above 1, which only density='synexp' has.")
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if bad := [limit for limit in budget.limits if limit.metric in ("latency", "memory")]:
        raise UsageError(f"precropping: {bad[0]} cannot be counted from widths; limit macs, parameters or size.")
    network = copy.deepcopy(model)
    graph = trace(network, example)
    limits = budget.resolve(count(network, example)).limits
    loads, cost = layer_loads(graph), WidthCost(network, example, graph)
    if density == "synexp":
        densities = _densities(loads, limits, cost, bounded=not reconfigure, least=float(least))
    else:
        densities = _of_masks(graph, loads, limits, cost, density, calibration)
    ratios = keep_ratios(loads, densities, most=float(most) if reconfigure else 1.0, rule=rule)
    if inner_only:
        ratios = {name: 1.0 if len(graph[name].of("producer")) > 1 else ratio for name, ratio in ratios.items()}
    sizes = {group.name: group.size for group in graph.groups}
    if reconfigure:
        graph, cost = _widened(network, example, graph, ratios, float(most))
    scores = {group.name: -torch.arange(group.size, dtype=torch.float32) for group in graph.groups}
    if inner_only:
        scores = {name: score for name, score in scores.items() if len(graph[name].of("producer")) == 1}
    ladders = build_ladders(scores, graph, WidthRules(multiple_of))
    selection = selection_of(ladders, scaled_rungs(ladders, ratios, sizes, limits, cost))
    if selection:
        apply(network, graph.shrink(selection))
    if initialise:
        initialise_again(network, seed)
    after = {name: len(selection[name]) if name in selection else graph[name].size for name in sizes}
    widths = {name: (size, after[name]) for name, size in sizes.items()}
    return PreCropped(network, widths, {load.name: float(p) for load, p in zip(loads, densities, strict=True)})


def _widened(
    network: nn.Module, example: Any, graph: ChannelGraph, ratios: Mapping[str, float], most: float
) -> tuple[ChannelGraph, WidthCost]:
    from convette.surgery import grow

    plan = {}
    for name, ratio in ratios.items():
        parts = graph[name].constraints.parts
        more = math.ceil((most - 1) * graph[name].size / parts) * parts
        if ratio > 1 and more:
            plan[name] = more
    if plan:
        apply(network, grow(graph, plan, exact=False))
    wider = trace(network, example)
    return wider, WidthCost(network, example, wider)


def initialise_again(network: nn.Module, seed: int) -> None:
    """Draw the weights of `network` anew, in place: every layer by its own ``reset_parameters``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, nn.Conv2d):
                # PyTorch's own range for convolutions is that of a leaky rectifier of slope sqrt(5); ours are plain.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
