"""Iterative pruning to a budget: score, allocate, cut, recover, again."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convette.cost import Budget, Cost
from convette.data import ImageData
from convette.pruning._measured import Measure, measure_latencies
from convette.pruning._run import prepare_run
from convette.pruning._units import check_finite
from convette.pruning.criteria import NEED_DATA
from convette.pruning.frameworks import FRAMEWORKS, check_framework
from convette.pruning.result import PruneResult
from convette.pruning.settings import PruneSettings
from convette.training import TrainSettings, resolve_device, start_distributed


def prune(
    model: nn.Module,
    data: ImageData | Tensor | tuple | list | dict,
    budget: Budget | str,
    settings: PruneSettings | None = None,
    *,
    train_settings: TrainSettings | None = None,
    measure: Measure = measure_latencies,
    checkpoint_dir: Path | str | None = None,
    device: str | torch.device = "auto",
) -> PruneResult:
    r"""Remove channels from a copy of `model` until it fits `budget`, step by step, and repair it on the way.

    Each of ``settings.steps`` steps scores the units anew (`criterion`), chooses those to keep under the cost of that
    step (`allocation`), shrinks the network for real, takes batch-norm statistics anew and trains it
    (``settings.epochs_of``), the unpruned network teaching. Step i of n aims at

    .. math:: c_i = c_0 \, (b / c_0)^{i/n}

    for every cost c with the bound b. A limit on latency is met by measurement: shrunk copies run on the limit's
    engine, interleaved with the start, and the MACs that meet it are searched; measured again at the end, it is cut
    further if it is missed (at most 3 times). A limit on memory is searched the same way with counted peaks.

    Args:
        model: any network that `convette.surgery.trace` can read; it is left as it is.
        data: a data set, or only an example input (tensor, tuple of arguments, dict of keywords), which leaves out
            recovery and accuracies and needs ``epochs=0`` and a criterion and allocation that work without data.
        budget: limits on macs, parameters, size, memory or latency; relative ones are relative to `model`.
        settings: the choices; by default `PruneSettings()`.
        train_settings: of the recovery, apart from the number of epochs; by default `convette.pruning.RECOVERY`.
        measure: what measures latencies: ``(networks by name, example, engine) -> latencies by name``.
        checkpoint_dir: keeps the state after every cut and every step; a run that finds its own state there goes on
            from it and ends with the same weights (bit for bit on one CPU thread, latency limits aside).
        device: for scoring, recovery and accuracy; latency is measured where the limit says.

    Under torchrun rank 0 decides what goes, all ranks cut alike. Costs, per step: scoring, some hundred cost
    predictions, the epochs. Raises `BudgetError` (with the smallest cost that can be reached, before anything is
    trained), `UsageError` (data missing for the choices made, a checkpoint of another run) and `StructureError`
    (weights or scores that are not finite).
    """
    start_distributed(device)
    check_finite(model)
    run = prepare_run(
        model,
        data,
        budget,
        settings or PruneSettings(),
        train_settings,
        measure,
        checkpoint_dir,
        resolve_device(device),
    )
    network = run.begin()
    while not run.done(network):
        network = run.next_step(network)
    return run.result(network)


def check_budget(
    model: nn.Module,
    data: ImageData | Tensor | tuple | list | dict,
    budget: Budget | str,
    settings: PruneSettings | None = None,
    *,
    measure: Measure = measure_latencies,
) -> Cost:
    """Return the smallest cost that `prune` with these settings can reach; `model` need not be trained for it.

    Its latency is measured where the budget limits one. Raises `BudgetError`, naming that cost, if it does not meet
    `budget`. Costs a trace, a cut of a copy, and a measurement for each engine of the budget.
    """
    settings = settings or PruneSettings()
    # How far a group can shrink depends on the criterion only where it scores some groups and not others.
    criterion = "random" if settings.criterion in NEED_DATA else settings.criterion
    options = {} if criterion != settings.criterion else settings.criterion_options
    plain = replace(
        settings,
        criterion=criterion,
        criterion_options=options,
        allocation="global",
        allocation_options={},
        schedule="iterative",
        schedule_options={},
        epochs=0,
    )
    run = prepare_run(model, data, budget, plain, None, measure, None, torch.device("cpu"))
    if settings.schedule in FRAMEWORKS:
        check_framework(replace(run, settings=settings))
    return run.check()
