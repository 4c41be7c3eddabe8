"""Whole frameworks as schedules of `prune`: each decides on its own what goes and when, and trains in between."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from convette._symbols import load_symbol
from convette.cost import Budget, count
from convette.data import ImageData
from convette.errors import UsageError, did_you_mean
from convette.pruning._in_training import IN_TRAINING
from convette.pruning._in_training import check_options as check_options_in_training
from convette.pruning.result import StepRecord
from convette.training import EpochRecord, distributed

if TYPE_CHECKING:
    from convette.pruning._run import Run

# Schedule -> its settings, and what runs it. What `PruneSettings` says itself is no option of theirs.
FRAMEWORKS: dict[str, tuple[str, str]] = {
    "block_then_channel": (
        "convette.pruning.yolov3_block_channel:BlockChannelSettings",
        "convette.pruning.yolov3_block_channel.scheduled:run",
    ),
    "n2n": ("convette.pruning.n2n:N2NSettings", "convette.pruning.n2n.scheduled:run"),
}
_OWN = ("seed", "epochs", "criterion", "multiple_of", "min_fraction", "constraints")


@dataclass(frozen=True)
class Outcome:
    """What a framework leaves: the network, a record a round, the epochs it trained. `epochs`: those still to come."""

    model: nn.Module
    records: tuple[StepRecord, ...]
    history: tuple[EpochRecord, ...] = ()
    epochs: int = 0


def check_options(schedule: str, options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an option that `schedule` does not have, or a value out of its range."""
    if schedule in IN_TRAINING:
        check_options_in_training(schedule, options)
        return
    if schedule not in FRAMEWORKS:
        if options:
            raise UsageError(f"schedule {schedule!r} has none; {', '.join((*IN_TRAINING, *FRAMEWORKS))} have.")
        return
    known = [field.name for field in fields(_settings(schedule)) if field.name not in _OWN]
    for option in options:
        if option not in known:
            own = " It is a key of [prune] itself." if option in _OWN else did_you_mean(option, known)
            raise UsageError(f"schedule {schedule} has no option {option!r}.{own}")
    _settings(schedule)(**options)


def framework_settings(schedule: str, options: Mapping[str, Any], **own: Any) -> Any:
    """Return the settings object of `schedule` with its `options` and those values of `own` that it has."""
    kind = _settings(schedule)
    names = {field.name for field in fields(kind)}
    return kind(**{**{key: value for key, value in own.items() if key in names}, **options})


def check_framework(run: "Run") -> None:
    """Raise the error that the framework would end with on this network and budget, before anything is trained."""
    schedule = run.settings.schedule
    if run.data is None:
        raise UsageError(f"prune.schedule = {schedule!r} trains in between: it needs a data set, not only an example.")
    if distributed.world_size() > 1:
        raise UsageError(f"prune.schedule = {schedule!r} runs in one process; start it without torchrun.")
    for limit in run.budget.limits:
        if limit.metric in ("latency", "memory"):
            raise UsageError(f"prune.schedule = {schedule!r} counts, it does not measure: limit macs, params or size.")
    import_module(FRAMEWORKS[schedule][1].partition(":")[0]).check(run)


def run_framework(run: "Run", network: nn.Module) -> nn.Module:
    """Run the framework on `network` and record its rounds; returns the network, trained to the end."""
    check_framework(run)
    began = time.perf_counter()
    settings = run.settings
    run.records[0] = replace(run.records[0], accuracy=run.accuracy(network))
    if run.limits and Budget(tuple(run.limits)).met(run.start):
        run.step = settings.cuts
        run.store.save(network, run.edits_before, run.step, True, run.facts(network))
        return network
    outcome: Outcome = load_symbol(FRAMEWORKS[settings.schedule][1])(run, network)
    run.records += outcome.records
    run.recovery += outcome.history
    run.store.save(outcome.model, run.edits_before, run.step, not outcome.epochs, run.facts(outcome.model))
    return run.repair(outcome.model, began) if outcome.epochs else outcome.model


def record_of(run: "Run", network: nn.Module, step: int, **figures: Any) -> StepRecord:
    """Return the record of `network` at `step`, counted."""
    return StepRecord(step, count(network, run.example), run.units(network), **figures)


def data_of(run: "Run") -> ImageData:
    """Return the run's data, which `check_framework` has seen to."""
    assert run.data is not None
    return run.data


def _settings(schedule: str) -> Any:
    return load_symbol(FRAMEWORKS[schedule][0])
