"""Block and channel pruning as a schedule of `prune`: the epochs of recovery are shared out over its rounds."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from convette.cost import Budget
from convette.pruning.frameworks import Outcome, data_of, framework_settings
from convette.pruning.yolov3_block_channel.factors import branch_norms
from convette.pruning.yolov3_block_channel.rounds import BlockChannelSettings, block_then_channel, no_blocks

if TYPE_CHECKING:
    from convette.pruning._run import Run


def check(run: "Run") -> None:
    """Raise `StructureError` for a network without residual blocks that end in a batch norm."""
    if not branch_norms(run.parent, run.example):
        raise no_blocks(run.parent)


def run(run: "Run", network: nn.Module) -> Outcome:
    """Run the rounds; nothing is left to recover after them."""
    found = block_then_channel(
        network,
        data_of(run),
        Budget(tuple(run.limits)),
        _settings(run),
        train_settings=run.train_settings,
        device=run.device,
    )
    return Outcome(found.model, found.records, found.history)


def _settings(run: "Run") -> BlockChannelSettings:
    choices = run.settings
    options: dict[str, Any] = dict(choices.schedule_options)
    defaults = {field.name: field.default for field in fields(BlockChannelSettings)}
    each = max(2, choices.epochs // int(options.get("rounds", defaults["rounds"])))
    options.setdefault("sparse_epochs", each // 2)
    return framework_settings(
        "block_then_channel",
        options,
        epochs=max(1, each - int(options["sparse_epochs"])),
        multiple_of=choices.multiple_of,
        min_fraction=choices.min_fraction,
        constraints=choices.constraints,
        seed=choices.seed,
    )
