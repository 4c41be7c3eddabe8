"""What a pruning run knows and does at one step; `schedule.prune` is the loop around it."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette._progress import note
from convette.cost import Budget, Cost, LatencyTable, Limit, count
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning import allocation, criteria
from convette.pruning._candidate import (
    Candidate,
    Selection,
    check_reachable,
    cut,
    prepare_candidate,
    reach_measured,
)
from convette.pruning._distributed import copy_from_main_rank, decided_by_main_rank
from convette.pruning._measured import MEASURED, Measure, MeasuredLimits
from convette.pruning._predicting import make_table
from convette.pruning._store import StateStore, fingerprint
from convette.pruning.recovery import recalibrate, recover
from convette.pruning.result import PruneResult, StepRecord, widths_of, write_history
from convette.pruning.settings import PruneSettings
from convette.surgery import ModelCard, card_of, set_card, structure_log, trace
from convette.training import EpochRecord, TrainSettings, distributed, evaluate

EXTRA_STEPS = 3
CALIBRATION_BATCH = 64


@dataclass
class Run:
    """Everything a pruning run knows. What a later sitting has to know again goes through `facts`."""

    parent: nn.Module
    example: Any
    data: ImageData | None
    settings: PruneSettings
    train_settings: TrainSettings | None
    device: torch.device
    budget: Budget
    start: Cost
    limits: tuple[Limit, ...]
    measured: MeasuredLimits
    minimum: Mapping[str, int]
    store: StateStore
    edits_before: int
    step: int = 0
    cap: float | None = None
    cap_metric: str = "macs"
    cap_start: float = 0.0
    reached: float = 0.0
    table: LatencyTable | None = None
    records: list[StepRecord] = field(default_factory=list)
    recovery: list[EpochRecord] = field(default_factory=list)
    latencies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """Return what a later sitting has to know, as JSON values."""
        return {
            "card": card_of(network).to_json(),
            "cap": self.cap,
            "cap_metric": self.cap_metric,
            "cap_start": self.cap_start,
            "reached": self.reached,
            "table": self.table.to_json() if self.table else None,
            "records": [record.to_json() for record in self.records],
            "recovery": [epoch.to_json() for epoch in self.recovery],
            "seconds": self.seconds(),
        }

    def seconds(self) -> float:
        """Return the seconds of the whole run, earlier sittings included."""
        return self.seconds_before + time.perf_counter() - self.started

    def begin(self) -> nn.Module:
        """Return the network to go on with: the kept one, its step brought to an end, or a copy of the start."""
        network = copy.deepcopy(self.parent)
        state = self.store.load(network)
        if state is None:
            self.records.append(StepRecord(0, self.start, self.units(network)))
            return network
        set_card(network, ModelCard.from_json(state.facts["card"]))
        self.step, self.cap = state.step, state.facts["cap"]
        self.cap_metric, self.cap_start = state.facts["cap_metric"], state.facts["cap_start"]
        self.reached, table = state.facts["reached"], state.facts["table"]
        self.table = LatencyTable.from_json(table) if table else None
        self.records = [StepRecord.from_json(record) for record in state.facts["records"]]
        self.recovery = [EpochRecord(**epoch) for epoch in state.facts["recovery"]]
        self.seconds_before = state.facts["seconds"]
        _say(f"pruning goes on after step {self.step}{'' if state.finished else ' (cut, not yet recovered)'}")
        return network if state.finished else self.repair(network, time.perf_counter())

    def next_step(self, network: nn.Module) -> nn.Module:
        """Cut `network` once more, repair it and keep it; returns the network to go on with."""
        began = time.perf_counter()
        self.step += 1
        graph = trace(network, self.example)
        decision = decided_by_main_rank(lambda: self.decide(network))
        if self.step == 1:
            # Only now: a budget that cannot be reached costs no evaluation.
            self.records[0] = replace(self.records[0], accuracy=self.accuracy(network))
        self.cap, self.cap_metric = decision["cap"], decision["cap_metric"]
        self.cap_start, self.reached = decision["cap_start"], decision["reached"]
        if decision["enough"]:
            _say("pruning: the network meets the budget as it is; nothing is removed")
            self.step = self.settings.steps
            self.store.save(network, self.edits_before, self.step, True, self.facts(network))
            return network
        selection = {name: torch.tensor(kept) for name, kept in decision["selection"].items()}
        cut(network, graph, selection)
        if self.data is not None and self.settings.recalibrate:
            recalibrate(network, self.data, seed=self.settings.seed)
        copy_from_main_rank(network)
        cost = count(network, self.example)
        before = self.accuracy(network)
        self.records.append(StepRecord(self.step, cost, self.units(network), 0, before, before, 0.0))
        self.store.save(network, self.edits_before, self.step, False, self.facts(network))
        return self.repair(network, began)

    def check(self) -> Cost:
        """Return the cost of the smallest network; `BudgetError` if the budget cannot be reached."""
        candidate = prepare_candidate(self.parent, self.example, self.minimum, self.settings, self.calibration(), 0)
        return check_reachable(candidate, self.budget, self.start, self.measured)

    def decide(self, network: nn.Module) -> dict[str, Any]:
        """Choose the units that stay at this step, on rank 0.

        Returns ``{"selection": {group: units}, "enough", "cap", "cap_metric", "cap_start", "reached"}``: `enough` says
        at the first step that all limits hold already, so that there is nothing to remove; the cap is on the MACs (or
        the latency by the table), None if nothing measured asks for one; `reached` is the selection's own.
        """
        if self.table is None and self.settings.predictor == "latency_table" and self.measured.engines:
            self.table = make_table(self.parent, self.example, self.measured.engines[0], self.store.directory)
        candidate = prepare_candidate(
            network, self.example, self.minimum, self.settings, self.calibration(), self.step, self.table
        )
        start = self.cap_start or candidate.capped({})
        selection, cap, enough = self._choose(candidate)
        return {
            "selection": _as_lists(selection),
            "enough": enough,
            "cap": cap,
            "cap_metric": candidate.cap_metric,
            "cap_start": start,
            "reached": candidate.capped(selection),
        }

    def _choose(self, candidate: Candidate) -> tuple[Selection, float | None, bool]:
        now, cap = candidate.capped({}), self.cap
        if self.step == 1:
            check_reachable(candidate, self.budget, self.start, self.measured)
            enough = Budget(tuple(self.limits)).met(self.start) if self.limits else True
            if self.measured.limits:
                _say(f"pruning: looking for the {_named(candidate)} that meets the measured limits")
                selection, cap = reach_measured(candidate, self.limits, self.measured, now, note=_say)
                enough = enough and cap is None
                if self.settings.steps == 1 and not enough:
                    return selection, cap, False
            if enough:
                return {}, None, True
        start = self.cap_start or now
        if self.step < self.settings.steps:
            return candidate.within(self.limits_at(self.step / self.settings.steps, cap, candidate, start)), cap, False
        if not self.measured.limits:
            return candidate.within(self.limits), cap, False
        # A step beyond the last means that the final measurement missed: the cap was lowered for it.
        floor = candidate.capped(candidate.smallest())
        beyond = (candidate.cap_limit(max(cap or now, floor)),) if self.step > self.settings.steps else ()
        selection, found = reach_measured(candidate, (*self.limits, *beyond), self.measured, now, guess=cap, note=_say)
        return selection, found if found is not None else cap, False

    def repair(self, network: nn.Module, began: float) -> nn.Module:
        """Train the cut `network` for the epochs of this step, record it and keep it."""
        epochs = self.settings.epochs_of(min(self.step, self.settings.steps)) if self.data else 0
        if self.step > self.settings.steps:
            epochs = min(1, epochs)
        record = self.records[-1]
        if epochs and self.data is not None:
            network, history = recover(
                network,
                self.parent,
                self.data,
                epochs,
                self.settings,
                train_settings=self.train_settings,
                device=self.device,
                checkpoint_dir=self.store.training_dir(self.step),
                title=f"recover, step {self.step} of {max(self.step, self.settings.steps)}",
            )
            self.recovery += history
            record = replace(record, epochs=epochs, accuracy=self.accuracy(network))
        self.records[-1] = replace(record, seconds=time.perf_counter() - began)
        self.store.save(network, self.edits_before, self.step, True, self.facts(network))
        accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.2%}"
        _say(f"pruning step {self.step}: {record.cost.macs / self.start.macs:.1%} of the MACs{accuracy}")
        return network

    def done(self, network: nn.Module) -> bool:
        """Tell whether all steps are made and, measured once more, the latency limits hold (or cutting on is vain)."""
        if self.step < self.settings.steps:
            return False
        if not self.measured.engines:
            return True
        verdict = decided_by_main_rank(lambda: self._measure_both(network))
        self.latencies = {
            name: {engine: _latency(value) for engine, value in engines.items()} for name, engines in verdict.items()
        }
        share = self._worst_latency()
        if share <= 1 or self.step >= self.settings.steps + EXTRA_STEPS:
            return True
        # One disturbed measurement must not cost most of the network: a fifth of it at most.
        self.cap = self.reached * max((1 - self.settings.latency_margin) / share, 0.8)
        _say(f"pruning: the final measurement is at {share:.1%} of the limit; cutting further")
        return False

    def result(self, network: nn.Module) -> PruneResult:
        """Return the result for the finished `network`."""
        start = replace(self.start, latency=dict(self.latencies.get("start", {})))
        end = replace(self.records[-1].cost, latency=dict(self.latencies.get("end", {})))
        statuses = tuple(self.budget.resolve(start).check(end))
        network.train(False)
        steps = (*self.records[:-1], replace(self.records[-1], cost=end))
        widths = widths_of(self.parent, network)
        result = PruneResult(network, start, end, statuses, steps, widths, tuple(self.recovery), self.seconds())
        write_history(network, result, str(self.budget), self.settings)
        return result

    def limits_at(self, fraction: float, cap: float | None, candidate: Candidate, cap_start: float) -> list[Limit]:
        """Return the limits after this fraction of the steps: each cost falls by the same factor a step."""
        found = [
            replace(limit, value=_on_the_way(float(self.start.get(limit.metric)), limit.value, fraction))
            for limit in self.limits
        ]
        return [*found, *([candidate.cap_limit(_on_the_way(cap_start, cap, fraction))] if cap is not None else [])]

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Return the calibration batches, ready for the network; none without data."""
        if self.data is None or not _needs_data(self.settings):
            return []
        split, left, found = self.data.train, self.settings.calibration_images, []
        for batch in split.batches(min(CALIBRATION_BATCH, left), shuffle=True, seed=self.settings.seed):
            images, labels = batch.images[:left].to(self.device), batch.labels[:left].to(self.device)
            found.append((self.data.preprocessing(images), labels))
            left -= len(labels)
            if left <= 0:
                break
        return found

    def accuracy(self, network: nn.Module) -> float | None:
        """Return the share of right answers on the validation split, None without data."""
        if self.data is None or not len(self.data.validation):
            return None
        return float(evaluate(network, self.data.validation, self.data.preprocessing, device=self.device).accuracy)

    def units(self, network: nn.Module) -> int:
        """Return how many removable units `network` has."""
        return sum(group.size for group in trace(network, self.example).groups)

    def _measure_both(self, network: nn.Module) -> dict[str, Any]:
        latencies = self.measured.latencies({"end": network})
        return {
            name: {engine: latency.to_json() for engine, latency in engines.items()}
            for name, engines in latencies.items()
        }

    def _worst_latency(self) -> float:
        start = replace(self.start, latency=dict(self.latencies["start"]))
        end = replace(self.records[-1].cost, latency=dict(self.latencies["end"]))
        statuses = self.budget.resolve(start).check(end)
        return max(s.value / s.limit.value for s in statuses if s.limit.metric == "latency")


def prepare_run(
    model: nn.Module,
    data: ImageData | Tensor | tuple | list | dict,
    budget: Budget | str,
    settings: PruneSettings,
    train_settings: TrainSettings | None,
    measure: Measure,
    checkpoint_dir: Path | str | None,
    device: torch.device,
) -> Run:
    """Count the start, sort the limits, name what a resumed run has to agree in."""
    images = data if isinstance(data, ImageData) else None
    if images is None:
        _check_without_data(settings)
    parent = copy.deepcopy(model).to(device).eval()
    example = to_device(images.preprocessing(images.train.images(torch.tensor([0]))) if images else data, device)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    start = count(parent, example)
    counted = Budget(tuple(limit for limit in budget.limits if limit.metric not in MEASURED))
    minimum = {group.name: math.ceil(settings.least_share * group.size) for group in trace(parent, example).groups}
    chosen = asdict(train_settings) if train_settings else None
    parts = [str(budget), asdict(settings), chosen]
    parts += [images.fingerprint, images.preprocessing.to_json()] if images else []
    return Run(
        parent=parent,
        example=example,
        data=images,
        settings=settings,
        train_settings=train_settings,
        device=device,
        budget=budget,
        start=start,
        limits=counted.resolve(start).limits,
        measured=MeasuredLimits(budget.limits, parent, example, start.memory, measure),
        minimum=minimum,
        store=StateStore(checkpoint_dir, fingerprint(parent, parts)),
        edits_before=len(structure_log(parent).edits),
    )


def to_device(example: Any, device: torch.device | str) -> Any:
    """Return the example (tensor, or tuple, list or dict of them) on `device`."""
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {key: to_device(value, device) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(to_device(value, device) for value in example)
    return example


def _named(candidate: Candidate) -> str:
    return "number of MACs" if candidate.cap_metric == "macs" else "latency by the table"


def _as_lists(selection: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: kept.tolist() for name, kept in selection.items()}


def _say(text: str) -> None:
    if distributed.is_main():
        note(text)


def _on_the_way(start: float, bound: float, fraction: float) -> float:
    if start <= bound or start <= 0 or bound <= 0:
        return bound
    return start * (bound / start) ** fraction


def _needs_data(settings: PruneSettings) -> bool:
    return settings.criterion in criteria.NEED_DATA or settings.allocation in allocation.NEED_DATA


def _check_without_data(settings: PruneSettings) -> None:
    if settings.criterion in criteria.NEED_DATA:
        raise UsageError(f"criterion {settings.criterion} needs a data set, not only an example; use l1, l2 or lamp.")
    if settings.allocation in allocation.NEED_DATA:
        raise UsageError(
            f"allocation {settings.allocation} needs a data set, not only an example; use global or uniform."
        )
    if settings.epochs:
        raise UsageError(
            f"prune.epochs = {settings.epochs}: recovery needs a data set, not only an example; use epochs=0."
        )


def _latency(value: Mapping[str, Any]) -> Any:
    from convette.runtime import Latency

    return Latency.from_json(value)
