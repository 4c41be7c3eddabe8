"""The schedules that are methods of one training: their own options, and the method made from a run's settings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convette._symbols import load_symbol
from convette.cost import Budget
from convette.errors import UsageError
from convette.pruning import _options

if TYPE_CHECKING:
    from convette.pruning.methods.gradual_pruning import GradualPruning
    from convette.pruning.settings import PruneSettings

IN_TRAINING: dict[str, str] = {
    "gradual": "convette.pruning.methods.gradual_pruning:GradualPruning",
    "growing": "convette.pruning.methods.growing_regularization:GrowingRegularization",
    "soft": "convette.pruning.methods.soft_pruning:SoftPruning",
}
# What `PruneSettings` says itself, and what the run fills in.
_OWN = (
    "criterion",
    "criterion_options",
    "allocation",
    "allocation_options",
    "multiple_of",
    "min_fraction",
    "constraints",
    "calibration_images",
    "seed",
)
_GIVEN = ("calibration", "data")


def check_options(schedule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` as the method of `schedule` takes them; `UsageError` for one it lacks or cannot use."""
    method = _method(schedule)
    for option in options:
        if option in _OWN:
            raise UsageError(f"schedule {schedule} has no option {option!r}. It is a key of [prune] itself.")
    checked = _options.check_options(f"schedule {schedule}", method.__init__, options, (*_OWN, *_GIVEN))
    method("macs<=50%", **checked)
    return checked


def make_method(settings: "PruneSettings", budget: Budget, calibration: list[Any]) -> "GradualPruning":
    """Return what prunes to `budget` within the training, as `settings` say."""
    return _method(settings.schedule)(
        budget,
        criterion=settings.criterion,
        criterion_options=settings.criterion_options,
        allocation=settings.allocation,
        allocation_options=settings.allocation_options,
        multiple_of=settings.multiple_of,
        min_fraction=settings.min_fraction,
        constraints=settings.constraints,
        calibration=calibration,
        seed=settings.seed,
        **check_options(settings.schedule, settings.schedule_options),
    )


def _method(schedule: str) -> Any:
    return load_symbol(IN_TRAINING[schedule])
