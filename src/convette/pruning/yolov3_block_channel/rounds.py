"""Rounds of sparse training, leaving blocks out, cutting channels and training on."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from convette.cost import Budget, count
from convette.data import ImageData
from convette.errors import BudgetError, StructureError, UsageError
from convette.pruning._blocks import drop_blocks
from convette.pruning.recovery import RECOVERY, recover
from convette.pruning.result import StepRecord
from convette.pruning.settings import PruneSettings
from convette.pruning.yolov3_block_channel.factors import SparseFactors, branch_norms
from convette.surgery import card_of, set_card, trace
from convette.training import EpochRecord, TrainSettings, evaluate, train


@dataclass(frozen=True)
class BlockChannelSettings:
    """What each round does.

    - `rounds`; `sparse_epochs`, `block_strength`, `scale_strength`: of `SparseFactors`.
    - `block_share`: of the blocks left, at most this goes in a round, those with the smallest factors; `threshold`:
      only those below it. One block of every stage (blocks that share a parent) stays.
    - `tied`: how the scales of layers that share a residual stream meet: "max" (default: a channel stays if any layer
      needs it), "mean", "min", "sum".
    - `epochs`: of recovery a round, taught by the unpruned network. `multiple_of`, `min_fraction`, `constraints`:
      see `PruneSettings`.
    """

    rounds: int = 2
    sparse_epochs: int = 3
    block_strength: float = 5e-3
    scale_strength: float = 5e-4
    block_share: float = 0.25
    threshold: float = float("inf")
    tied: str = "max"
    epochs: int = 3
    multiple_of: int = 1
    min_fraction: float | int = 0.1
    constraints: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.sparse_epochs, self.epochs) < 1:
            raise UsageError("block and channel pruning: rounds, sparse_epochs and epochs must be at least 1.")
        if self.tied not in ("max", "mean", "min", "sum"):
            raise UsageError(f"block and channel pruning: tied = {self.tied!r} is none of 'max', 'mean', 'min', 'sum'.")
        if not 0 <= self.block_share <= 1:
            raise UsageError(f"block and channel pruning: block_share = {self.block_share} must be a share.")


@dataclass(frozen=True)
class BlockChannelResult:
    """The pruned network; the blocks that went and all factors, by round; MACs of the start and after each round.

    `records`: one a round, with cost and accuracies on the validation split; `history`: all epochs of training.
    """

    model: nn.Module
    blocks: tuple[tuple[str, ...], ...]
    factors: tuple[dict[str, float], ...]
    macs: tuple[int, ...]
    records: tuple[StepRecord, ...] = ()
    history: tuple[EpochRecord, ...] = ()


def block_then_channel(
    model: nn.Module,
    data: ImageData,
    budget: Budget | str,
    settings: BlockChannelSettings | None = None,
    *,
    train_settings: TrainSettings | None = None,
    device: str | torch.device = "cpu",
) -> BlockChannelResult:
    """Prune a copy of `model` to `budget` (macs, parameters or size) in rounds: blocks by factor, channels by scale.

    A round trains sparsely, leaves out the blocks with the smallest factors, folds the others, cuts channels by
    batch-norm scale (``bn_scale``; a residual stream goes by its largest member) on the way to the budget, each cost by
    the same factor a round, and trains on with the unpruned network as teacher. Raises `BudgetError` where the budget
    cannot be reached, `UsageError` for one that is measured, `StructureError` for a network without residual blocks
    that can be left out. Costs ``rounds * (sparse_epochs + epochs)`` epochs.
    """
    # `prune` offers this as a schedule, so it is imported when both are there.
    from convette.pruning.schedule import prune

    settings = settings or BlockChannelSettings()
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if bad := [limit for limit in budget.limits if limit.metric in ("latency", "memory")]:
        raise UsageError(f"block and channel pruning counts: {bad[0]} is for `prune`.")
    parent, network = copy.deepcopy(model).eval(), copy.deepcopy(model)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    if settings.block_share and not branch_norms(parent, example):
        raise no_blocks(parent)
    start, card = count(parent, example), card_of(model)
    bounds = budget.resolve(start).limits
    blocks, factors, macs, records, history = [], [], [start.macs], [], []
    # An average over steps has no exact zeros.
    base = replace(train_settings or RECOVERY, ema_decay=None)
    for turn in range(1, settings.rounds + 1):
        began = time.perf_counter()
        sparse = SparseFactors(settings.block_strength, settings.scale_strength)
        trained = train(
            network,
            data,
            replace(base, epochs=settings.sparse_epochs, seed=settings.seed + turn),
            methods=(sparse,),
            device=device,
            title=f"sparse training, round {turn}",
        )
        network = trained.model
        gone = smallest_factors(sparse.factors, settings.block_share, settings.threshold)
        drop_blocks(network, gone)
        limits = tuple(
            replace(limit, value=_on_the_way(float(start.get(limit.metric)), limit.value, turn / settings.rounds))
            for limit in bounds
        )
        choices = PruneSettings(
            criterion="bn_scale",
            criterion_options={"reduce": settings.tied},
            steps=1,
            epochs=0,
            multiple_of=settings.multiple_of,
            min_fraction=settings.min_fraction,
            constraints=settings.constraints,
            seed=settings.seed,
        )
        try:
            network = prune(network, data, Budget(limits), choices, device=device).model
        except BudgetError as error:
            raise BudgetError(f"round {turn} of block and channel pruning: {error}") from error
        before = _accuracy(network, data, device)
        network, epochs = recover(
            network, parent, data, settings.epochs, choices, train_settings=base, device=device, title=f"round {turn}"
        )
        history += [*trained.history, *epochs]
        blocks.append(gone)
        factors.append(dict(sparse.factors))
        cost = count(network, example)
        macs.append(cost.macs)
        units = sum(group.size for group in trace(network, example).groups)
        now, seconds = _accuracy(network, data, device), time.perf_counter() - began
        records.append(StepRecord(turn, cost, units, settings.epochs, before, now, seconds, gone))
    set_card(network, card)  # the cuts of the rounds are one step of the history, which the caller writes
    return BlockChannelResult(
        network.eval(), tuple(blocks), tuple(factors), tuple(macs), tuple(records), tuple(history)
    )


def no_blocks(network: nn.Module) -> StructureError:
    """Return the error for a network without blocks that can be left out."""
    return StructureError(
        f"block and channel pruning: {type(network).__name__} has no residual block that ends in a batch norm and can"
        " be left out; cut channels alone (prune.schedule = 'iterative')."
    )


def _accuracy(network: nn.Module, data: ImageData, device: Any) -> float:
    return float(evaluate(network, data.validation, data.preprocessing, device=device).accuracy)


def smallest_factors(factors: dict[str, float], share: float, threshold: float) -> tuple[str, ...]:
    """Return the blocks that go: the smallest factors by size, at most `share` of all, one left beside each parent."""
    left: dict[str, int] = {}
    for block in factors:
        parent = block.rpartition(".")[0]
        left[parent] = left.get(parent, 0) + 1
    gone: list[str] = []
    for block in sorted(factors, key=lambda name: abs(factors[name])):
        parent = block.rpartition(".")[0]
        if len(gone) < int(share * len(factors) + 1e-9) and abs(factors[block]) < threshold and left[parent] > 1:
            gone.append(block)
            left[parent] -= 1
    return tuple(gone)


def _on_the_way(start: float, bound: Any, share: float) -> float:
    return float(bound) if start <= bound else start * (float(bound) / start) ** share
