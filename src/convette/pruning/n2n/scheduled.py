"""N2N as a schedule of `prune`: search, then train the best student as long as recovery says."""

from typing import TYPE_CHECKING

from torch import nn

from convette.cost import Budget
from convette.errors import StructureError
from convette.pruning.frameworks import Outcome, data_of, framework_settings, record_of
from convette.pruning.n2n.search import N2NSettings, n2n
from convette.surgery import removable, trace

if TYPE_CHECKING:
    from convette.pruning._run import Run


def check(run: "Run") -> None:
    """Raise `StructureError` for a network in which there is nothing to decide."""
    settings = _settings(run)
    has_blocks = bool(settings.removal_epochs) and bool(removable(run.parent, run.example))
    if not has_blocks and not (settings.shrink_epochs and trace(run.parent, run.example).groups):
        raise StructureError(
            f"prune.schedule = 'n2n': {type(run.parent).__name__} has no block that can be left out"
            f"{'' if settings.shrink_epochs == 0 else ' and no channels that can go'}."
        )


def run(run: "Run", network: nn.Module) -> Outcome:
    """Search the best student within the budget; recovery then trains it, taught by the unpruned network."""
    found = n2n(
        network,
        data_of(run),
        _settings(run),
        budget=Budget(tuple(run.limits)) if run.limits else None,
        train_settings=run.train_settings,
        device=run.device,
    )
    accuracy = found.best.accuracy
    record = record_of(run, found.model, 1, accuracy=accuracy, blocks=found.best.blocks)
    return Outcome(found.model, (record,), epochs=run.settings.epochs)


def _settings(run: "Run") -> N2NSettings:
    choices = run.settings
    return framework_settings(
        "n2n",
        choices.schedule_options,
        criterion=choices.criterion,
        multiple_of=choices.multiple_of,
        min_fraction=choices.min_fraction,
        constraints=choices.constraints,
        seed=choices.seed,
    )
