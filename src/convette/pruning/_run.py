"""What a pruning run knows and does at one step; `schedule.prune` is the loop around it."""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette.cost import Budget, Cost, LatencyTable, Limit, count
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning import allocation, criteria
from convette.pruning._blocks import drop_blocks, untied
from convette.pruning._calibration import cut, draw_calibration
from convette.pruning._deciding import Decision, decide, say, smallest_cost
from convette.pruning._distributed import copy_from_main_rank, decided_by_main_rank
from convette.pruning._in_training import make_method
from convette.pruning._keeping_zeros import Sparsity, sparsity_to_keep
from convette.pruning._measured import MEASURED, Measure, MeasuredLimits, engine_of
from convette.pruning._store import StateStore, fingerprint
from convette.pruning._widths import sizes_of
from convette.pruning.frameworks import FRAMEWORKS, run_framework
from convette.pruning.recovery import recalibrate, recover
from convette.pruning.redistribution import redistribute
from convette.pruning.result import PruneResult, StepRecord, widths_of, write_history
from convette.pruning.settings import PruneSettings
from convette.pruning.sparsity import apply_masks
from convette.surgery import ChannelGraph, ModelCard, card_of, set_card, structure_log, trace
from convette.training import EpochRecord, Method, TrainSettings, evaluate

EXTRA_STEPS = 3


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
    sizes: Mapping[str, int]
    store: StateStore
    edits_before: int
    step: int = 0
    cap: float | None = None
    cap_metric: str = "macs"
    cap_start: float = 0.0
    reached: float = 0.0
    table: LatencyTable | None = None
    targets: list[tuple[str, float]] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    recovery: list[EpochRecord] = field(default_factory=list)
    latencies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    traced: tuple[nn.Module, int, ChannelGraph] | None = None
    sparsity: Sparsity | None = None

    def graph(self, network: nn.Module) -> ChannelGraph:
        """Return what goes together in `network`; it is traced again only once its structure has changed."""
        edits = len(structure_log(network).edits)
        if self.traced is None or self.traced[0] is not network or self.traced[1] != edits:
            self.traced = (network, edits, trace(network, self.example))
        return self.traced[2]

    def facts(self, network: nn.Module) -> dict[str, Any]:
        """Return what a later sitting has to know, as JSON values."""
        return {
            "card": card_of(network).to_json(),
            "cap": self.cap,
            "cap_metric": self.cap_metric,
            "cap_start": self.cap_start,
            "reached": self.reached,
            "targets": [list(target) for target in self.targets],
            "sizes": dict(self.sizes),
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
        if self.sparsity:
            say(f"pruning: {self.sparsity.words}")
        state = self.store.load(network)
        if state is None:
            network = untied(network, self.example) if self.settings.untie else network
            self.records.append(StepRecord(0, self.start, self.units(network)))
            return network
        set_card(network, ModelCard.from_json(state.facts["card"]))
        self.step, self.cap = state.step, state.facts["cap"]
        self.cap_metric, self.cap_start = state.facts["cap_metric"], state.facts["cap_start"]
        self.reached, table = state.facts["reached"], state.facts["table"]
        self.table = LatencyTable.from_json(table) if table else None
        self.targets = [(metric, value) for metric, value in state.facts["targets"]]
        self.sizes = state.facts["sizes"]
        self.records = [StepRecord.from_json(record) for record in state.facts["records"]]
        self.recovery = [EpochRecord(**epoch) for epoch in state.facts["recovery"]]
        self.seconds_before = state.facts["seconds"]
        say(f"pruning goes on after step {self.step}{'' if state.finished else ' (cut, not yet recovered)'}")
        return network if state.finished else self.repair(network, time.perf_counter())

    def next_step(self, network: nn.Module) -> nn.Module:
        """Cut `network` once more, repair it and keep it; returns the network to go on with."""
        began = time.perf_counter()
        self.step += 1
        if self.settings.schedule in FRAMEWORKS:
            return run_framework(self, network)
        decision = Decision(**decided_by_main_rank(lambda: asdict(decide(self, network))))
        if self.step == 1:
            # Only now: a budget that cannot be reached costs no evaluation.
            self.records[0] = replace(self.records[0], accuracy=self.accuracy(network))
        self.cap, self.cap_metric = decision.cap, decision.cap_metric
        self.cap_start, self.reached = decision.cap_start, decision.reached
        self.targets = [(str(metric), float(value)) for metric, value in decision.targets]
        if decision.enough:
            say("pruning: the network meets the budget as it is; nothing is removed")
            self.step = self.settings.cuts
            self.store.save(network, self.edits_before, self.step, True, self.facts(network))
            return network
        if decision.blocks:
            say(f"pruning: {', '.join(decision.blocks)} left out")
            drop_blocks(network, decision.blocks)
            self.sizes = sizes_of(self.graph(network))
        if decision.selection:
            self.shrink(network, {name: torch.tensor(kept) for name, kept in decision.selection.items()})
        if self.data is not None and self.settings.recalibrate and (decision.selection or decision.blocks):
            recalibrate(network, self.data, seed=self.settings.seed)
        copy_from_main_rank(network)
        before = self.accuracy(network)
        record = StepRecord(self.step, count(network, self.example), self.units(network), 0, before, before)
        self.records.append(replace(record, blocks=tuple(decision.blocks)))
        self.store.save(network, self.edits_before, self.step, False, self.facts(network))
        return self.repair(network, began)

    def shrink(self, network: nn.Module, selection: Mapping[str, Tensor]) -> None:
        """Cut `network` to `selection`, in place; what stays takes over what goes if that is asked for."""
        graph = self.graph(network)
        if self.settings.redistribute and self.data is not None:
            zeros = self.sparsity.zeros(network) if self.sparsity else {}
            redistribute(network, graph, selection, self.calibration(), ridge=None)
            apply_masks(network, zeros)
        cut(network, graph, selection)
        if self.sparsity:
            self.sparsity.restore(network)

    def check(self) -> Cost:
        """Return the cost of the smallest network; `BudgetError` if the budget cannot be reached."""
        return smallest_cost(self)

    def repair(self, network: nn.Module, began: float) -> nn.Module:
        """Train the cut `network` for the epochs of this step, record it and keep it."""
        epochs = self.settings.epochs_of(min(self.step, self.settings.cuts)) if self.data else 0
        if self.step > self.settings.cuts:
            epochs = min(1, epochs)
        record = self.records[-1]
        if epochs and self.data is not None:
            self.traced = None  # Training may do more to a network than its log says.
            network, history = recover(
                network,
                self.parent,
                self.data,
                epochs,
                self.settings,
                train_settings=self.train_settings,
                methods=(*self.pruning_methods(), *(self.sparsity.methods(network) if self.sparsity else ())),
                device=self.device,
                checkpoint_dir=self.store.training_dir(self.step),
                title=f"recover, step {self.step} of {max(self.step, self.settings.cuts)}",
            )
            self.recovery += history
            record = replace(record, epochs=epochs, accuracy=self.accuracy(network))
            if self.targets:
                record = replace(record, cost=count(network, self.example), units=self.units(network))
                self.reached = float(record.cost.macs)
                self.targets = []
        self.records[-1] = replace(record, seconds=time.perf_counter() - began)
        self.store.save(network, self.edits_before, self.step, True, self.facts(network))
        accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.2%}"
        say(f"pruning step {self.step}: {record.cost.macs / self.start.macs:.1%} of the MACs{accuracy}")
        return network

    def done(self, network: nn.Module) -> bool:
        """Tell whether all steps are made and, measured once more, the latency limits hold (or cutting on is vain)."""
        if self.step < self.settings.cuts:
            return False
        if not self.measured.engines:
            return True
        verdict = decided_by_main_rank(lambda: self._measure_both(network))
        self.latencies = {
            name: {engine: _latency(value) for engine, value in engines.items()} for name, engines in verdict.items()
        }
        share = self._worst_latency()
        if share <= 1 or self.step >= self.settings.cuts + EXTRA_STEPS:
            return True
        # One disturbed measurement must not cost most of the network: a fifth of it at most.
        self.cap = self.reached * max((1 - self.settings.latency_margin) / share, 0.8)
        say(f"pruning: the final measurement is at {share:.1%} of the limit; cutting further")
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

    def pruning_methods(self) -> tuple[Method, ...]:
        """Return what prunes during the training of this step, where the schedule is one of those that do."""
        if not self.targets:
            return ()
        limits = tuple(Limit(metric, None, value, False, None) for metric, value in self.targets)
        return (make_method(self.settings, Budget(limits), self.calibration()),)

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Return the calibration batches, ready for the network; none without data."""
        if self.data is None or not _needs_data(self.settings):
            return []
        choices = self.settings
        return draw_calibration(self.data, choices.calibration_images, seed=choices.seed, device=self.device)

    def accuracy(self, network: nn.Module) -> float | None:
        """Return the share of right answers on the validation split, None without data."""
        if self.data is None or not len(self.data.validation):
            return None
        return float(evaluate(network, self.data.validation, self.data.preprocessing, device=self.device).accuracy)

    def units(self, network: nn.Module) -> int:
        """Return how many removable units `network` has."""
        return self.graph(network).units

    def _measure_both(self, network: nn.Module) -> dict[str, Any]:
        latencies = self.measured.latencies({"end": network})
        return {
            name: {engine: latency.to_json() for engine, latency in engines.items()}
            for name, engines in latencies.items()
        }

    def _worst_latency(self) -> float:
        start = replace(self.start, latency=dict(self.latencies["start"]))
        end = replace(self.records[-1].cost, latency=dict(self.latencies["end"]))
        shares = []
        for status in self.budget.resolve(start).check(end):
            limit, value = status.limit, status.value
            if limit.metric == "latency":
                # A tail differs more between measurements than a median: the upper end of its interval counts.
                if limit.percentile in ("p95", "p99"):
                    value = end.latency[engine_of(limit)].upper(limit.percentile)
                shares.append(value / limit.value)
        return max(shares)


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
        sizes=sizes_of(trace(parent, example)),
        store=StateStore(checkpoint_dir, fingerprint(parent, parts)),
        edits_before=len(structure_log(parent).edits),
        sparsity=sparsity_to_keep(parent, settings),
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


def _needs_data(settings: PruneSettings) -> bool:
    return (
        settings.criterion in criteria.NEED_DATA
        or settings.allocation in allocation.NEED_DATA
        or settings.redistribute
        or settings.blocks > 0
    )


def _check_without_data(settings: PruneSettings) -> None:
    if settings.criterion in criteria.NEED_DATA:
        raise UsageError(f"criterion {settings.criterion} needs a data set, not only an example; use l1, l2 or lamp.")
    if settings.allocation in allocation.NEED_DATA:
        raise UsageError(
            f"allocation {settings.allocation} needs a data set, not only an example; use global or uniform."
        )
    if settings.blocks and settings.blocks_by == "information":
        raise UsageError("prune.blocks_by = 'information' needs a data set, not only an example; use 'loss'.")
    if settings.epochs:
        raise UsageError(
            f"prune.epochs = {settings.epochs}: recovery needs a data set, not only an example; use epochs=0."
        )


def _latency(value: Mapping[str, Any]) -> Any:
    from convette.runtime import Latency

    return Latency.from_json(value)
