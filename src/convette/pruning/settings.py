"""The choices of a pruning run, as a recipe holds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from convette.errors import UsageError, did_you_mean
from convette.pruning import allocation, criteria, frameworks
from convette.pruning._in_training import IN_TRAINING
from convette.pruning._widths import width_constraints
from convette.pruning.frameworks import FRAMEWORKS
from convette.surgery import WidthConstraints

OptionValue = str | int | float | bool | list[str | int | float] | tuple[str | int | float, ...]
CHOICES = {
    "predictor": ("macs", "latency_table"),
    "schedule": ("iterative", *IN_TRAINING, *FRAMEWORKS),
    "blocks_by": ("loss", "information"),
    "distil_from": ("logits", "features", "in_place"),
}


@dataclass(frozen=True)
class PruneSettings:
    """How `prune` gets to the budget.

    - `criterion`, `criterion_options`: what a unit is worth (a name in `CRITERIA`, and that function's own options).
    - `allocation`, `allocation_options`: where the budget is spent (a name in `ALLOCATIONS`, and that function's own
      options, such as the `generations` of "evolution").
    - `schedule`: "iterative" cuts and recovers in `steps`; "gradual", "growing" and "soft" prune in one training of all
      `epochs`: by many small cuts (`GradualPruning`), by a growing decay of what is cut later
      (`GrowingRegularization`), by masks that units may come back from (`SoftPruning`). Whole frameworks decide for
      themselves and count only: "n2n" (policies remove and shrink), "block_then_channel" (rounds of sparse training).
    - `schedule_options`: of "gradual", "growing" and "soft" `begin`, `end`, `times` and `floor`, as in those classes;
      of a framework the fields of `N2NSettings`, `BlockChannelSettings`.
    - `steps`: the cost falls in this many steps, each by the same factor; scores are taken anew at each. 1: one shot.
    - `untie`: residual streams are un-tied first (`convette.surgery.untie`): each layer then chooses on its own which
      channels of a stream it writes and reads, at the price of gathers and scatters.
    - `blocks`: this share of the blocks that can be left out (input and output alike) may go before the first cut: as
      many as the budget cannot do without, and, with data, as many as leave the lower loss at the budget.
    - `blocks_by`: which blocks go first: those whose absence costs the least "loss" (without data: that change least
      what they read), or those with the least "information" a MAC (`layer_information`; the first and the last of a
      stage stay).
    - `epochs`: recovery by training, over the whole run: every step gets ``epochs // steps``, the last the rest as
      well. 0: none.
    - `redistribute`: before each cut the weights that stay take over, by least squares on the calibration images, what
      those that go did; without data, and in schedules that cut while training, there is none. On because it gained in
      all of 129 cuts of ResNet-20 and ResNet-56 tried with and without (25 points in the median, before training), and
      13 after training on the digits (``docs/recovery.md``); a pass over the images and a solve a layer.
    - `recalibrate`: batch-norm statistics are taken anew on training images after each cut.
    - `keep_zeros`: what is exactly zero in a network that was made sparse stays so through cuts and recovery, in its
      pattern ("2:4") if it has one; off, it learns again. Schedules that are frameworks do not keep it.
    - `distil`: the unpruned network teaches during recovery; `distil_from`: by its "logits", by its "features" at the
      end of each stage as well, or "in_place", going on to learn itself.
    - `constraints`: what every cut keeps to, in a line: ``"multiple_of=8, minimum=16, whole_heads, keep stem*"``
      (`convette.surgery.WidthConstraints`).
    - `multiple_of`: channels stay in multiples of this. `min_fraction`: this share of the units that every group had at
      the start stays at least. Both are short for the same in `constraints`, and hold beside what is asked there.
    - `calibration_images`: training images for the criteria and allocations that need data.
    - `predictor`: what stands for a latency between two measurements: "macs", or "latency_table": layer times measured
      once at the start, which tell a fast layer from one that only counts less; the allocation then spends
      milliseconds. It takes seconds to minutes more.
    - `latency_margin`: a latency limit is aimed at from this share below, so that noise does not tip it over.
    - `seed`: of everything drawn at random.

    Raises `UsageError` for a value out of range or an unknown name.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    criterion: str = "l1"
    criterion_options: Mapping[str, OptionValue] = field(default_factory=dict)
    allocation: str = "global"
    allocation_options: Mapping[str, OptionValue] = field(default_factory=dict)
    schedule: Literal["iterative", "gradual", "growing", "soft", "n2n", "block_then_channel"] = "iterative"
    schedule_options: Mapping[str, OptionValue] = field(default_factory=dict)
    steps: int = 5
    untie: bool = False
    blocks: float | int = 0.0
    blocks_by: Literal["loss", "information"] = "loss"
    epochs: int = 3
    redistribute: bool = True
    distil: bool = True
    distil_from: Literal["logits", "features", "in_place"] = "logits"
    recalibrate: bool = True
    keep_zeros: bool = True
    constraints: str = ""
    multiple_of: int = 1
    min_fraction: float | int = 0.1
    calibration_images: int = 256
    predictor: Literal["macs", "latency_table"] = "macs"
    latency_margin: float | int = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name, offered in CHOICES.items():
            chosen = getattr(self, name)
            if chosen not in offered:
                raise UsageError(f"prune.{name} = {chosen!r} is unknown.{did_you_mean(str(chosen), offered)}")
        for name, check in (
            ("criterion", criteria.check_options),
            ("allocation", allocation.check_options),
            ("schedule", frameworks.check_options),
        ):
            _named(f"prune.{name}_options", check, getattr(self, name), getattr(self, f"{name}_options"))
        if self.schedule != "iterative" and not self.epochs:
            raise UsageError(f"prune.schedule = {self.schedule!r} prunes while training: prune.epochs = 0 leaves none.")
        if self.schedule != "iterative" and self.predictor != "macs":
            raise UsageError(f"prune.schedule = {self.schedule!r} counts, it does not predict: use predictor = 'macs'.")
        if self.predictor == "latency_table" and self.allocation in allocation.ONLY_COUNTED:
            raise UsageError(
                f"prune.allocation = {self.allocation!r} needs a cost it can count; with a latency table use opti_cut."
            )
        for name, least in (("steps", 1), ("epochs", 0), ("multiple_of", 1), ("calibration_images", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"prune.{name} = {getattr(self, name)}: at least {least} is needed.")
        if not 0 <= self.min_fraction <= 1:
            raise UsageError(f"prune.min_fraction = {self.min_fraction}: a share between 0 and 1 is needed.")
        try:
            _ = self.width_constraints
        except UsageError as error:
            raise UsageError(f"prune.constraints = {self.constraints!r}: {error}") from error
        if not 0 <= self.blocks <= 1:
            raise UsageError(f"prune.blocks = {self.blocks}: a share between 0 and 1 is needed.")
        if not 0 <= self.latency_margin < 0.5:
            raise UsageError(f"prune.latency_margin = {self.latency_margin}: a share between 0 and 0.5 is needed.")

    @property
    def cuts(self) -> int:
        """How many steps of cutting and recovering a run has: `steps`, or one where pruning is in the training."""
        return self.steps if self.schedule == "iterative" else 1

    @property
    def width_constraints(self) -> WidthConstraints:
        """What every cut keeps to: `constraints`, `multiple_of` and `min_fraction` as one."""
        return width_constraints(self.constraints, self.multiple_of, self.min_fraction)

    def epochs_of(self, step: int) -> int:
        """Return the recovery epochs of `step` (1-based); the network at its final size gets the remainder."""
        if self.schedule != "iterative":
            return self.epochs
        share, rest = divmod(self.epochs, self.steps)
        return share + rest if step == self.steps else share


def _named(key: str, check: Callable[..., Any], chosen: str, options: Mapping[str, Any]) -> None:
    """Check a name and its options; an error of the options is told by their `key`."""
    check(chosen, {})
    try:
        check(chosen, options)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from error
