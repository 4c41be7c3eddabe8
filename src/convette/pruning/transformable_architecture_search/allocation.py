"""TAS as an allocation: a distribution over widths for every group of any traced network, learned by gradient."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from convette.cost import Limit, WidthCost
from convette.errors import UsageError
from convette.pruning._calibration import CutLoss
from convette.pruning._options import check_values
from convette.pruning._units import Scores
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation._scaling import scaled_rungs
from convette.pruning.allocation._search import PREDICTED, absolute_limits, predicted, selection_of
from convette.pruning.criteria._gates import Gates
from convette.pruning.precropping import layer_loads
from convette.pruning.transformable_architecture_search.choices import budget_loss, two_choices
from convette.surgery import ChannelGraph

CHOICES = 8


def differentiable_widths(
    scores: Scores,
    graph: ChannelGraph,
    width_cost: WidthCost,
    limit: Limit | Sequence[Limit],
    *,
    rules: WidthRules | None = None,
    loss: Callable[[Mapping[str, Tensor]], float] | None = None,
    steps: Annotated[int, Field(ge=1)] = 100,
    size_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05,
    weight_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    budget_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Learn by gradient how wide each group should be: TAS's two sampled widths, mixed, on any network.

    .. math:: g_u = p_1 [r_u < C_1] + p_2 [r_u < C_2], \qquad L_w = CE(D_1), \quad L_A = CE(D_2) + 2\, L_{flop}

    Every group has eight widths, from 30 % to 100 % (lower where the limit needs it), and logits A over them, which
    start about the one share that meets the limit. In every step two widths a group are drawn and mixed (`two_choices`,
    temperature 5 to 0.1): unit u, of rank r_u by `scores`, is multiplied by g_u where it is read. As units keep their
    place, nothing has to be aligned. A learns with `budget_loss` on the expected cost. What is returned has the most
    probable widths or the expected ones, whichever loses less when cut, all times the one factor that meets the limits.
    A limit on latency (`prune.predictor` "latency_table") is learned from the table: each group's expected milliseconds
    over its eight widths, the others at their expected ones.

    `steps`, `size_rate`: of A (Adam). `weight_rate` above 0: steps alternate as published, weights of a copy on one
    half of the calibration images, A on the other; weights that are trained already need no more of it. With a loss
    that is only a function of the selection the mixture of two losses stands for the loss of the mixture. Depth is not
    chosen here: `prune.blocks` leaves blocks out first, and `search` is the published supernet over both.

    Returns the kept units of every group that loses some; the same for the same `seed`. Raises `BudgetError` with the
    smallest reachable cost, `UsageError` without `loss`. Costs `steps` passes whose gradient ends in
    the gates. Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019, 1905.09717.
    """
    if loss is None:
        raise UsageError(
            "allocation transformable_architecture_search learns from the loss: give a data set, or use uniform."
        )
    options = {"steps": steps, "size_rate": size_rate, "weight_rate": weight_rate, "budget_weight": budget_weight}
    check_values("allocation transformable_architecture_search", differentiable_widths, **options)
    ladders = build_ladders(scores, graph, rules)
    limits = absolute_limits(limit)
    if all(float(predicted(width_cost, one.metric, {})) <= one.value for one in limits):
        return {}
    sizes = {ladder.name: ladder.size for ladder in ladders}
    # The one share that meets the limit, and the error if none does.
    rungs = scaled_rungs(ladders, {}, sizes, limits, width_cost)
    share = sum(ladder.widths[rungs[ladder.name]] for ladder in ladders) / max(1, sum(sizes.values()))
    search = _Search(ladders, graph, width_cost, limits, min(0.95, share), seed)
    if isinstance(loss, CutLoss):
        search.learn(loss, steps, size_rate, weight_rate, budget_weight)
    else:
        search.learn_from_values(loss, steps, size_rate, budget_weight)
    found = [
        selection_of(ladders, scaled_rungs(ladders, ratios, sizes, limits, width_cost))
        for ratios in (search.most_probable(), search.expected())
    ]
    prices = [float(loss(selection)) for selection in found]
    # A loss that is no number is never the smaller one.
    return found[1] if prices[1] <= prices[0] or math.isnan(prices[0]) else found[0]


class _Search:
    """The distributions, what they cost, and how they learn."""

    def __init__(
        self,
        ladders: Sequence[Ladder],
        graph: ChannelGraph,
        width_cost: WidthCost,
        limits: Sequence[Limit],
        share: float,
        seed: int,
    ) -> None:
        self.ladders, self.graph, self.width_cost, self.limits = ladders, graph, width_cost, limits
        self.generator = torch.Generator().manual_seed(seed)
        lowest = min(0.3, 0.6 * share)
        self.tenths = torch.linspace(lowest, 1.0, CHOICES)
        start = -(((self.tenths - share) / 0.25) ** 2)
        noise = 0.01 * torch.randn(len(ladders), CHOICES, generator=self.generator)
        self.logits = (start + noise).requires_grad_()
        # Widths that the ladders have, nearest to the wanted shares.
        self.rungs = [
            [min(range(len(x.widths)), key=lambda i, x=x, t=t: abs(x.widths[i] - t * x.size)) for t in self.tenths]
            for x in ladders
        ]
        self.widths = torch.tensor(
            [[x.widths[i] for i in rungs] for x, rungs in zip(ladders, self.rungs, strict=True)], dtype=torch.float32
        )
        self.sizes = torch.tensor([x.size for x in ladders], dtype=torch.float32)
        self.place = {x.name: number for number, x in enumerate(ladders)}
        self.loads = layer_loads(graph)
        self.whole = {one.metric: float(predicted(width_cost, one.metric, {})) for one in limits}

    def learn(self, loss: CutLoss, steps: int, size_rate: float, weight_rate: float, budget_weight: float) -> None:
        """Alternate between the weights of a copy, on the first half of the batches, and the sizes, on the second."""
        network = copy.deepcopy(loss.network).eval().requires_grad_(False)
        for norm in network.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and min(len(y) for _, y in loss.batches) > 1:
                norm.train()
        gates = Gates(network, self.graph, learning=True)
        masks = {x.name: self._masks(x, rungs) for x, rungs in zip(self.ladders, self.rungs, strict=True)}
        weights = torch.optim.SGD(network.parameters(), weight_rate, momentum=0.9) if weight_rate else None
        halves = [loss.batches[offset::2] or loss.batches for offset in (0, 1)] if weights else [loss.batches] * 2
        first, second = (_endless(half) for half in halves)
        for temperature, optimizer in self._steps(steps, size_rate):
            if weights is not None:
                images, labels = next(first)
                network.requires_grad_(True)
                with torch.no_grad():
                    drawn = self._gates(gates, masks, temperature, labels.device)
                weights.zero_grad()
                functional.cross_entropy(gates(drawn, images), labels).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                weights.step()
                network.requires_grad_(False)
            images, labels = next(second)
            drawn = self._gates(gates, masks, temperature, labels.device)
            value = functional.cross_entropy(gates(drawn, images), labels)
            self._update(optimizer, value, budget_weight)

    def learn_from_values(
        self, loss: Callable[[Mapping[str, Tensor]], float], steps: int, size_rate: float, budget_weight: float
    ) -> None:
        """Learn from a loss that has no gradient: of the two draws, the widths of the better one gain."""
        for temperature, optimizer in self._steps(min(steps, 35), size_rate):
            draws = [two_choices(row, temperature, self.generator) for row in self.logits]
            values = []
            for side in (0, 1):
                rungs = {
                    x.name: mine[drawn[side]]
                    for x, mine, (drawn, _) in zip(self.ladders, self.rungs, draws, strict=True)
                }
                values.append(float(loss(selection_of(self.ladders, rungs))))
            if not all(math.isfinite(value) for value in values):
                values = [float(not math.isfinite(value)) for value in values]
            mixed = torch.stack([p[0] * values[0] + p[1] * values[1] for _, p in draws]).sum()
            self._update(optimizer, mixed, budget_weight)

    def most_probable(self) -> dict[str, float]:
        """Return the arg-max share of each group."""
        best = self.logits.detach().argmax(1)
        return {x.name: float(self.widths[i, int(best[i])] / self.sizes[i]) for i, x in enumerate(self.ladders)}

    def expected(self) -> dict[str, float]:
        """Return the expected share of each group."""
        shares = self._expected().detach()
        return {x.name: float(shares[i]) for i, x in enumerate(self.ladders)}

    def _steps(self, steps: int, rate: float) -> Iterator[tuple[float, torch.optim.Optimizer]]:
        optimizer = torch.optim.Adam([self.logits], rate, betas=(0.5, 0.999), weight_decay=1e-3)
        for step in range(steps):
            yield 0.1 + 4.9 * 0.5 * (1 + math.cos(math.pi * step / steps)), optimizer

    def _update(self, optimizer: torch.optim.Optimizer, value: Tensor, budget_weight: float) -> None:
        total = value + budget_weight * self._budget()
        if not bool(torch.isfinite(total)):
            return
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    def _expected(self) -> Tensor:
        return (self.logits.softmax(1) * self.widths).sum(1) / self.sizes

    def _budget(self) -> Tensor:
        """Return the budget's loss of the limit that is furthest from being met."""
        rungs = {
            x.name: mine[int(row.argmax())] for x, mine, row in zip(self.ladders, self.rungs, self.logits, strict=True)
        }
        selection = selection_of(self.ladders, rungs)
        reached = {one.metric: float(predicted(self.width_cost, one.metric, selection)) for one in self.limits}
        worst = max(self.limits, key=lambda one: reached[one.metric] / float(one.value))
        whole, target = self.whole[worst.metric], float(worst.value)
        known = worst.metric in PREDICTED
        expected = self._share_by_loads(worst.metric) if known else self._by_prediction(worst.metric) / whole
        # As a share of the whole: the same gradient, whatever the unit.
        return budget_loss(expected, reached[worst.metric] / whole, target / whole, 1.0)

    def _share_by_loads(self, metric: str) -> Tensor:
        """Return the expected share of a counted cost, from what each layer costs whole."""
        shares = self._expected()
        by_weights, parts, total = metric in ("parameters", "size"), [], 0.0
        for load in self.loads:
            amount = load.weights if by_weights else load.macs
            known = [(shares[self.place[g]], e) for g, e in load.groups.items() if g in self.place]
            total += amount
            if known:
                parts.append(amount * torch.stack([share**exponent for share, exponent in known]).prod())
            else:
                parts.append(shares.new_tensor(amount))
        return torch.stack(parts).sum() / max(total, 1e-12)

    def _by_prediction(self, metric: str) -> Tensor:
        """Return the cost at the expected widths, with the gradient of each group's expectation, the others there."""
        columns = torch.tensor([self.width_cost.groups.index(x.name) for x in self.ladders])
        chances = self.logits.softmax(1)
        here = torch.tensor(self.width_cost.sizes, dtype=torch.float32)
        here[columns] = (chances.detach() * self.widths).sum(1)
        rows = here.repeat(len(columns), CHOICES, 1)
        rows.scatter_(2, columns[:, None, None].expand(-1, CHOICES, 1), self.widths[:, :, None])
        costs = self.width_cost.predict(metric, rows).to(chances)
        value = self.width_cost.predict(metric, here).to(chances)
        of_groups = (chances * costs).sum()
        return value + of_groups - of_groups.detach()

    def _masks(self, ladder: Ladder, rungs: Sequence[int]) -> Tensor:
        masks = torch.zeros(len(rungs), ladder.size)
        for row, rung in enumerate(rungs):
            masks[row, ladder.kept(rung)] = 1
        return masks

    def _gates(
        self, gates: Gates, masks: Mapping[str, Tensor], temperature: float, device: torch.device
    ) -> dict[str, Tensor]:
        drawn = {}
        for name, size in gates.sizes.items():
            if name not in self.place:
                drawn[name] = torch.ones(size, device=device)
                continue
            chosen, p = two_choices(self.logits[self.place[name]], temperature, self.generator)
            drawn[name] = (p[0] * masks[name][chosen[0]] + p[1] * masks[name][chosen[1]]).to(device)
        return drawn


def _endless(batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches
