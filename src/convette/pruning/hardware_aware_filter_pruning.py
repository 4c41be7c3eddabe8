"""HFP: filters that change the output least go until a predicted, then measured latency is met.

HFP: Hardware-Aware Filter Pruning for Deep Convolutional Neural Networks Acceleration, F. Yu and others, ICPR 2020: no
arXiv id, no code. Three parts that go with anything: the criterion `information_gain`, the allocation `opti_cut`, and
the table of layer times, `convette.cost.LatencyTable`. As a whole::

    prune(model, data, "latency<=60%@openvino:cpu", PruneSettings(
        criterion="information_gain", allocation="opti_cut", predictor="latency_table"))
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from convette.cost import Limit, WidthCost
from convette.errors import StructureError, UsageError
from convette.layers._watching import hooked, in_eval, keeping_gradients
from convette.pruning._options import check_values
from convette.pruning._units import Scores, finite_scores
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation._search import (
    Rungs,
    absolute_limits,
    fill_up,
    out_of_reach,
    predicted,
    selection_of,
)
from convette.surgery import ChannelGraph, Group

MOST_STEPS = 600
LOOK_AHEAD = 8


def information_gain(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    mode: Literal["fisher", "exact"] = "fisher",
    temperature: Annotated[float | int, Field(gt=0)] = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Score units by how much the output distribution changes when they go, in nats.

    .. math:: IG_u = E_x\, \mathrm{KL}\bigl(p(\cdot|x) \,\|\, p_{-u}(\cdot|x)\bigr) \approx
        \tfrac12\, E_{x,\, y \sim p(\cdot|x)} \Bigl( \frac{\partial \log p_y}{\partial m_u} \Bigr)^2

    with :math:`m_u = 1` a factor on what every convolution and linear layer reads of unit u. ``mode="fisher"`` is the
    right side, with one label drawn a image; ``mode="exact"`` the middle, with one forward pass a unit and batch.
    No true label is used. `temperature` softens p (1 to 4 where the network is sure of itself). Log-probabilities are
    taken in float32.

    `calibration` yields ``(images, labels)``; 256 to 1024 images are enough. Returns scores, CPU float32, of every
    group that convolutions or linear layers read; others are not scored and so stay whole. Gains add up over the heads
    of a network with several outputs. Raises `UsageError` without calibration images, for another mode or a
    temperature that is not above 0, `StructureError` for scores that are not finite. Costs a forward and backward pass
    a batch (fisher).
    """
    check_values("criterion information_gain", information_gain, mode=mode, temperature=temperature)
    readers = {group.name: found for group in graph.groups if group.size and (found := _readers(model, group))}
    totals = {name: torch.zeros(graph[name].size) for name in readers}
    generator, seen = torch.Generator().manual_seed(seed), 0
    with in_eval(model), keeping_gradients(model.parameters()):
        model.requires_grad_(False)
        for images, _ in calibration or ():
            found = (
                _fisher(model, images, readers, float(temperature), generator)
                if mode == "fisher"
                else _exact(model, images, readers, graph, float(temperature))
            )
            for name, gain in found.items():
                totals[name] += gain
            seen += len(images)
    if not seen:
        raise UsageError("criterion information_gain needs calibration images: give a data set, or use l1, l2 or lamp.")
    return finite_scores({name: total / seen for name, total in totals.items()}, "information_gain", graph)


# A reader of a group: the module, and for each unit the channels of its input that are the unit's.
_Reader = tuple[nn.Module, Tensor]


def _readers(model: nn.Module, group: Group) -> list[_Reader]:
    modules, found = dict(model.named_modules()), []
    for member in group.of("consumer"):
        module = modules[member.module]
        if not isinstance(module, nn.Conv2d | nn.Linear) or not member.parameter.endswith("weight") or member.dim != 1:
            continue
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        each = int(module.weight.shape[1])
        found.append((module, torch.cat([member.index + part * each for part in range(groups)], dim=1)))
    return found


def _fisher(
    model: nn.Module, images: Tensor, readers: Mapping[str, list[_Reader]], temperature: float, generator: Any
) -> dict[str, Tensor]:
    modules = {module for found in readers.values() for module, _ in found}
    with torch.enable_grad(), _scaled_inputs(modules, len(images)) as factors:
        loss = torch.zeros(())
        for logits in _heads(model(images)):
            logp = functional.log_softmax(logits.float() / temperature, dim=1)
            if not torch.isfinite(logp).all():
                raise StructureError(
                    "criterion information_gain: the network's outputs are not finite; look for the step that broke its"
                    " weights, or score with calibration images it can handle."
                )
            drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
            loss = loss + logp.gather(1, drawn).sum().cpu()
        used = [module for module in modules if module in factors]
        gradients = torch.autograd.grad(loss, [factors[module] for module in used])
    by_module = dict(zip(used, gradients, strict=True))
    result = {}
    for name, found in readers.items():
        per_image = sum(
            by_module[module][:, index.to(by_module[module].device)].sum(dim=2)
            for module, index in found
            if module in by_module
        )
        if isinstance(per_image, Tensor):
            result[name] = 0.5 * per_image.square().sum(dim=0).cpu()
    return result


@torch.no_grad()
def _exact(
    model: nn.Module, images: Tensor, readers: Mapping[str, list[_Reader]], graph: ChannelGraph, temperature: float
) -> dict[str, Tensor]:
    def log_probabilities() -> list[Tensor]:
        return [functional.log_softmax(logits.float() / temperature, dim=1) for logits in _heads(model(images))]

    whole, result = log_probabilities(), {}
    for name, found in readers.items():
        gains = torch.zeros(graph[name].size)
        for unit in range(len(gains)):
            handles = [module.register_forward_pre_hook(_without(index[unit])) for module, index in found]
            with hooked(handles):
                without = log_probabilities()
            gains[unit] = sum(
                float(functional.kl_div(b, a, reduction="sum", log_target=True))
                for a, b in zip(whole, without, strict=True)
            )
        result[name] = gains.clamp_min(0.0)
    return result


def _without(channels: Tensor) -> Callable[..., Any]:
    def zero(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        if isinstance(module, nn.Conv2d):
            x[:, channels.to(x.device)] = 0
        else:
            x[..., channels.to(x.device)] = 0
        return (x, *inputs[1:])

    return zero


@contextmanager
def _scaled_inputs(modules: Iterable[nn.Module], batch: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Multiply each image's input channels of `modules` by ones that have a gradient; yields them as they come."""
    factors: dict[nn.Module, Tensor] = {}

    def scale(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        channels = x.shape[1] if isinstance(module, nn.Conv2d) else x.shape[-1]
        if module not in factors:
            factors[module] = torch.ones(batch, channels, device=x.device, dtype=x.dtype, requires_grad=True)
        own = factors[module]
        # One factor an image; sequences folded into the batch repeat it.
        shape = (batch, channels, 1, 1) if isinstance(module, nn.Conv2d) else (batch, *[1] * (x.ndim - 2), channels)
        return (x * own.view(shape), *inputs[1:])

    with hooked([module.register_forward_pre_hook(scale) for module in modules]):
        yield factors


def _heads(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [part for part in parts if isinstance(part, Tensor) and part.ndim == 2]


def opti_cut(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[..., float] | None = None,
    per_cost: bool = True,
) -> dict[str, Tensor]:
    r"""Remove units one by one, the least score for what it saves first, with the cost predicted anew after each.

    .. math:: (g, j)^* = \arg\min_{g,\, j \le 8} \frac{\sum_{i \le j} s_{g,i}}{\sum_m \min\{c_m(K) - c_m(K
        \setminus u_{g,1..j}),\, c_m(K) - b_m\} / b_m}

    over the groups g and how many of their next units go at once, for the limits m still missed; what is saved beyond a
    limit does not count. Costs of hardware are
    staircases on which one unit often saves nothing: looking `LOOK_AHEAD` units ahead pays for a whole step, or leaves
    the layer alone. ``per_cost=False`` goes by score alone, as the paper's first form. In the end every unit that fits
    below the limits comes back (widths go up to the edge of their step).

    Any predicted cost: MACs, parameters, size, or latency of a `convette.cost.LatencyCost`. Networks of more than 600
    units lose several at a time. Returns the kept units of every group that loses some. Raises `BudgetError` with the
    smallest reachable cost. Costs groups x 8 cost predictions a unit removed; `loss` is not used.
    """
    ladders = build_ladders(scores, graph, rules)
    limits = absolute_limits(limit)

    def fits(rungs: Rungs) -> bool:
        selection = selection_of(ladders, rungs)
        return all(predicted(width_cost, one.metric, selection) <= one.value for one in limits)

    rungs = {ladder.name: len(ladder.widths) - 1 for ladder in ladders}
    if fits(rungs):
        return {}
    smallest = dict.fromkeys(rungs, 0)
    if not fits(smallest):
        raise out_of_reach(limits, width_cost, selection_of(ladders, smallest))
    stride = max(1, sum(len(ladder.widths) - 1 for ladder in ladders) // MOST_STEPS)
    columns = {ladder.name: width_cost.groups.index(ladder.name) for ladder in ladders}
    while not fits(rungs):
        ladder, rung = _best_step(ladders, rungs, columns, width_cost, limits, stride, per_cost)
        rungs[ladder.name] = rung
    return selection_of(ladders, fill_up(ladders, rungs, fits))


def _best_step(
    ladders: Sequence[Ladder],
    rungs: Rungs,
    columns: Mapping[str, int],
    width_cost: WidthCost,
    limits: Sequence[Limit],
    stride: int,
    per_cost: bool,
) -> tuple[Ladder, int]:
    here = torch.tensor(width_cost.sizes)
    for ladder in ladders:
        here[columns[ladder.name]] = ladder.widths[rungs[ladder.name]]
    ahead = [
        (ladder, max(rungs[ladder.name] - stride * j, 0))
        for ladder in ladders
        for j in range(1, LOOK_AHEAD + 1)
        if rungs[ladder.name] - stride * (j - 1) > 0
    ]
    trial = here.repeat(len(ahead), 1)
    for row, (ladder, rung) in enumerate(ahead):
        trial[row, columns[ladder.name]] = ladder.widths[rung]
    saved = np.zeros(len(ahead))
    for one in limits:
        now = float(width_cost.predict(one.metric, here[None])[0])
        if now > one.value:
            less = now - width_cost.predict(one.metric, trial).double().numpy()
            saved += np.minimum(less, now - float(one.value)) / max(float(one.value), 1e-12)
    price = np.array([_score_of(ladder, rung, rungs[ladder.name]) for ladder, rung in ahead])
    # What saves nothing is the last choice, the cheapest of it first: on a plateau wider than the look-ahead.
    useful = saved > 1e-12
    order = np.where(useful, price / np.maximum(saved, 1e-12) if per_cost else price, np.inf)
    if not useful.any():
        order = price
    return ahead[int(np.argmin(order))]


def _score_of(ladder: Ladder, low: int, high: int) -> float:
    return sum(
        max(ladder.block_scores[block], 0.0) * (ladder.widths[block + 1] - ladder.widths[block])
        for block in range(low, high)
    )
