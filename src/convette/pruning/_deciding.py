"""What goes at a step of a pruning run: decided on rank 0, as plain values that the other ranks are told."""

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._progress import note
from convette.cost import Budget, Cost, Limit
from convette.errors import BudgetError
from convette.pruning._blocks import allowance, least_informative, least_missed, untied, without_blocks
from convette.pruning._candidate import (
    Candidate,
    Selection,
    check_reachable,
    prepare_candidate,
    reach_measured,
)
from convette.pruning._predicting import make_table
from convette.pruning._widths import sizes_of
from convette.pruning.recovery import recalibrate
from convette.training import distributed

if TYPE_CHECKING:
    from convette.pruning._run import Run


@dataclass
class Decision:
    """What goes at a step. All plain JSON values.

    `blocks` are left out first, then `selection` (kept units by group) is cut. `enough`: all limits hold already and
    nothing goes. `cap` is on the `cap_metric` (MACs, or the latency by the table), None if nothing measured asks for
    one; `cap_start` is that of the start, `reached` that of the selection. `targets` (metric and value) is what the
    training has to prune to, where the schedule prunes in training.
    """

    selection: dict[str, list[int]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    enough: bool = False
    cap: float | None = None
    cap_metric: str = "macs"
    cap_start: float = 0.0
    reached: float = 0.0
    targets: list = field(default_factory=list)


def decide(run: "Run", network: nn.Module) -> Decision:
    """Choose what goes at the step that `run` is at. Raises `BudgetError` if the budget cannot be reached."""
    if run.table is None and run.settings.predictor == "latency_table" and run.measured.engines:
        run.table = make_table(run.parent, run.example, run.measured.engines[0], run.store.directory)
    if run.step > 1 or not run.settings.blocks:
        return _within(run, _candidate(run, network))
    return _with_blocks(run, network)


def smallest_cost(run: "Run") -> Cost:
    """Return the cost of the smallest network that `run` could end with; `BudgetError` if it misses the budget."""
    network = untied(copy.deepcopy(run.parent), run.example) if run.settings.untie else run.parent
    try:
        return check_reachable(_candidate(run, network), run.budget, run.start, run.measured)
    except BudgetError:
        blocks = _order(run, network)
        if not blocks:
            raise
        return check_reachable(_candidate(run, without_blocks(network, blocks)), run.budget, run.start, run.measured)


def _candidate(run: "Run", network: nn.Module) -> Candidate:
    sizes = run.sizes
    if network is not run.parent and run.step <= 1:
        sizes = sizes_of(run.graph(network))
    return prepare_candidate(run.graph(network), sizes, run.settings, run.calibration(), run.step, run.table)


def _within(run: "Run", candidate: Candidate, whole: bool = True) -> Decision:
    start = run.cap_start or candidate.capped({})
    selection, cap, enough = _choose(run, candidate, start, whole)
    targets: list = []
    if run.settings.schedule != "iterative" and run.step == 1 and not enough:
        targets = [[limit.metric, float(limit.value)] for limit in run.limits]
        targets += [["macs", cap]] if cap is not None else []
        selection = {}
    return Decision(
        selection={name: kept.tolist() for name, kept in selection.items()},
        enough=enough,
        cap=cap,
        cap_metric=candidate.cap_metric,
        cap_start=start,
        reached=candidate.capped(selection),
        targets=targets,
    )


def _choose(run: "Run", candidate: Candidate, start: float, whole: bool) -> tuple[Selection, float | None, bool]:
    now, cap = candidate.capped({}), run.cap
    if run.step == 1:
        check_reachable(candidate, run.budget, run.start, run.measured)
        enough = Budget(tuple(run.limits)).met(run.start) if run.limits else True
        if run.measured.limits:
            named = "number of MACs" if candidate.cap_metric == "macs" else "latency by the table"
            say(f"pruning: looking for the {named} that meets the measured limits")
            selection, cap = reach_measured(candidate, run.limits, run.measured, now, note=say)
            enough = enough and cap is None
            if run.settings.cuts == 1 and not enough:
                return selection, cap, False
        if enough and whole:
            return {}, None, True
    if run.step < run.settings.cuts:
        return candidate.within(_limits_at(run, run.step / run.settings.cuts, cap, candidate, start)), cap, False
    if not run.measured.limits:
        return candidate.within(run.limits), cap, False
    # A step beyond the last means that the final measurement missed: the cap was lowered for it.
    floor = candidate.capped(candidate.smallest())
    beyond = (candidate.cap_limit(max(cap or now, floor)),) if run.step > run.settings.cuts else ()
    selection, found = reach_measured(candidate, (*run.limits, *beyond), run.measured, now, guess=cap, note=say)
    return selection, found if found is not None else cap, False


def _limits_at(run: "Run", fraction: float, cap: float | None, candidate: Candidate, cap_start: float) -> list[Limit]:
    """Return the limits after this fraction of the steps: each cost falls by the same factor a step."""
    found = [
        replace(limit, value=_on_the_way(float(run.start.get(limit.metric)), limit.value, fraction))
        for limit in run.limits
    ]
    return [*found, *([candidate.cap_limit(_on_the_way(cap_start, cap, fraction))] if cap is not None else [])]


def _with_blocks(run: "Run", network: nn.Module) -> Decision:
    """Decide for the network as it is and with blocks left out, and take what loses least at the whole budget."""
    best: Decision | None = None
    lowest, first_error = float("inf"), None
    for blocks in _offers(run, network):
        without = without_blocks(network, blocks)
        try:
            candidate = _candidate(run, without)
            decision = _within(run, candidate, not blocks)
        except BudgetError as error:
            first_error = first_error or error
            continue
        if decision.enough:
            return decision
        decision.blocks = list(blocks)
        if run.data is None:
            return decision
        loss = _loss_at_the_end(run, candidate, decision)
        named = f"without {', '.join(blocks)}" if blocks else "with all blocks"
        say(f"pruning: {named} the loss at the budget is {loss:.4g}")
        if best is None or loss < lowest:
            best, lowest = decision, loss
    if best is None:
        assert first_error is not None
        raise first_error
    return best


def _offers(run: "Run", network: nn.Module) -> list[tuple[str, ...]]:
    order = _order(run, network)
    return [order[:count] for count in range(len(order) + 1)]


def _order(run: "Run", network: nn.Module) -> tuple[str, ...]:
    count = allowance(network, run.example, run.settings.blocks)
    if run.settings.blocks_by == "information":
        return least_informative(network, run.example, count, run.calibration())
    batches = run.calibration()[:1]
    loss = (lambda model: _mean_loss(model, batches)) if batches else None
    return least_missed(network, run.example, count, loss)


def _loss_at_the_end(run: "Run", candidate: Candidate, decision: Decision) -> float:
    limits = [*run.limits, *([candidate.cap_limit(decision.cap)] if decision.cap is not None else [])]
    network = candidate.cut(candidate.within(limits)) if limits else copy.deepcopy(candidate.network)
    if run.data is not None and run.settings.recalibrate:
        recalibrate(network, run.data, seed=run.settings.seed)
    return _mean_loss(network, run.calibration())


@torch.no_grad()
def _mean_loss(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    network.eval()
    total = sum(float(functional.cross_entropy(network(x), y, reduction="sum")) for x, y in batches)
    mean = total / sum(len(y) for _, y in batches)
    return mean if mean == mean else float("inf")


def _on_the_way(start: float, bound: float, fraction: float) -> float:
    if start <= bound or start <= 0 or bound <= 0:
        return bound
    return start * (bound / start) ** fraction


def say(text: str) -> None:
    """Tell the user, on rank 0."""
    if distributed.is_main():
        note(text)
