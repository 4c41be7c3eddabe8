"""Whole layers that say little about the network's output are left out, until a budget holds (Soltani et al., 2020).

What a layer says is `convette.pruning.layer_information`. Candidates are all that the network can do without: blocks
that keep the shape of what they read, and single layers of a DenseNet, whose features are concatenated. Reconstructed,
like the measure, from the abstract of On the Information of Feature Maps and Pruning of Deep Neural Networks.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.cost import Budget, Cost, count
from convette.errors import BudgetError, StructureError, UsageError
from convette.layers._watching import hooked
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.pruning.criteria.feature_map_information import distance_correlation, layer_information, pooled_maps
from convette.surgery import Edit, apply, removable, removable_features, remove, remove_features, trace


@dataclass(frozen=True)
class LayerRemoval:
    """A network without some of its layers: which went, in order, and what each was worth when it went."""

    model: nn.Module
    removed: tuple[str, ...]
    scores: Mapping[str, float]


def remove_layers(
    model: nn.Module,
    example: Any,
    calibration: Iterable[Any] | None,
    budget: Budget | str,
    *,
    keep: Sequence[str] = (),
    ends: bool = False,
    measure: Literal["renyi", "energy", "binned"] = "renyi",
    rule: Literal["value", "gain"] = "value",
    target: Literal["output", "label"] = "output",
) -> LayerRemoval:
    r"""Leave whole layers out of a copy of `model`, the least informative a MAC first, until it fits `budget`.

    .. math:: \text{next} = \arg\min_l \; r_l / \text{MACs}_l

    with :math:`r_l` of `layer_information`, taken anew after each removal: scores shift once a neighbour is gone.
    Candidates are `candidate_layers`, except those in `keep`; the first and the last layer of each stage only with
    ``ends=True``. Removing a residual block leaves its skip, a DenseNet layer takes its columns in all later ones
    along.

    Raises `BudgetError` with what is left when the candidates run out, `UsageError` for a limit that is not counted
    (macs, parameters, size, memory). Statistics of batch norms are as they were: recalibrate, then train. Costs a
    scoring, a count and (where features are concatenated) a trace a removal.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if any(limit.metric == "latency" for limit in budget.limits):
        raise UsageError("remove_layers counts, it does not measure: give limits on macs, parameters, size or memory.")
    batches = batches_of(calibration, "remove_layers")
    network = copy.deepcopy(model)
    cost = count(network, example)
    resolved = budget.resolve(cost)
    spared = {*keep, *(() if ends else stage_ends(network, example))}
    removed: dict[str, float] = {}
    while not resolved.met(cost):
        candidates = [name for name in candidate_layers(network, example) if name not in spared]
        if not candidates:
            hint = "" if ends else " (first and last layers of stages stay; ends=True lets them go)"
            raise BudgetError(
                f"no block is left to remove: without {len(removed)} of them the network has {cost.macs / 1e6:.4g} M"
                f" MACs and {cost.parameters} parameters, and {budget} is not met{hint}."
            )
        scores = layer_information(network, candidates, batches, measure=measure, rule=rule, target=target)
        prices = {name: score / max(1, macs_of(cost, name)) for name, score in scores.items()}
        name = min(prices, key=prices.__getitem__)
        apply(network, *layer_edits(network, name, example))
        removed[name] = scores[name]
        cost = count(network, example)
    return LayerRemoval(network, tuple(removed), removed)


def redundant_layers(
    model: nn.Module,
    layers: Sequence[str],
    calibration: Iterable[Any] | None,
    *,
    low: float,
    alike: float = 0.95,
    gain: float = 0.0,
    measure: Literal["renyi", "energy", "binned"] = "renyi",
    target: Literal["output", "label"] = "output",
    pool: int = 4,
) -> tuple[str, ...]:
    r"""Return those of `layers`, in the order in which they run, that need no budget to be called superfluous.

    .. math:: r_l < \text{low} \quad\text{or}\quad
        dCor(T_l, T_{l-1}) > \text{alike} \;\text{and}\; r_l - r_{l-1} < \text{gain}

    with T what a layer adds and r what that says (`layer_information`); l - 1 is the one before it in `layers`. `low`
    and `gain` are in the unit of `measure`, and depend on the number of images. The next scoring sees other values once
    one is gone: take out one at a time, or those that are not neighbours. Raises what `layer_information` raises. Costs
    two forward passes and n^2 a pair.
    """
    batches = batches_of(calibration, "redundant_layers")
    scores = layer_information(model, layers, batches, measure=measure, target=target, pool=pool)
    _, added, _ = pooled_maps(model, layers, batches, target, pool)
    found = {name for name in layers if scores[name] < low}
    for before, name in pairwise(layers):
        close = float(distance_correlation(added[name], added[before])) > alike
        if close and scores[name] - scores[before] < gain:
            found.add(name)
    return tuple(name for name in layers if name in found)


def candidate_layers(network: nn.Module, example: Any) -> tuple[str, ...]:
    """Return what the network can do without: `removable` blocks, and layers whose features are concatenated.

    Cost: two runs of the network, and a trace where one of its modules reads a list of feature maps.
    """
    blocks = removable(network, example)
    dense = removable_features(network, trace(network, example)) if _reads_lists(network, example) else ()
    return (*blocks, *(name for name in dense if not any(f"{name}.".startswith(f"{one}.") for one in blocks)))


def layer_edits(network: nn.Module, name: str, example: Any) -> tuple[Edit, ...]:
    """Return the edits that leave out the candidate called `name`."""
    try:
        return (remove(network, name, example),)
    except StructureError:
        return remove_features(network, name, trace(network, example))


def stage_ends(network: nn.Module, example: Any) -> tuple[str, ...]:
    """Return the first and the last layer of every stage: of layers side by side that give maps of one shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = {id(module): name for name, module in network.named_modules()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(names[id(module)], tuple(output.shape[1:]))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with hooked(handles), scoring(network), torch.no_grad():
        run(network, example)
    found: dict[str, None] = {}
    for parent in {name.rpartition(".")[0]: None for name in candidate_layers(network, example)}:
        prefix = f"{parent}." if parent else ""
        children = [f"{prefix}{leaf}" for leaf, _ in network.get_submodule(parent).named_children()]
        stage: list[str] = []
        for child in [*children, ""]:
            if stage and (not child or shapes.get(child) != shapes.get(stage[0])):
                found |= {stage[0]: None, stage[-1]: None}
                stage = []
            if child in shapes:
                stage.append(child)
    return tuple(found)


def _reads_lists(network: nn.Module, example: Any) -> bool:
    seen: list[bool] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(bool(args) and isinstance(args[0], list))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with hooked(handles), scoring(network), torch.no_grad():
        run(network, example)
    return any(seen)


def macs_of(cost: Cost, name: str) -> int:
    """Return the multiply-accumulates of the layer called `name`."""
    return sum(layer.macs for layer in cost.layers if f"{layer.name}.".startswith(f"{name}."))
