"""The choices of a pruning run, as a recipe holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from convette.errors import UsageError
from convette.pruning.allocation import ONLY_COUNTED, find_allocation
from convette.pruning.criteria import check_options
from convette.surgery import WidthConstraints

OptionValue = str | int | float | bool


@dataclass(frozen=True)
class PruneSettings:
    """How `prune` gets to the budget.

    - `criterion`, `criterion_options`: what a unit is worth (a name in `CRITERIA`, and that function's own options).
    - `allocation`: where the budget is spent (a name in `ALLOCATIONS`).
    - `steps`: the cost falls in this many steps, each by the same factor; scores are taken anew at each.
    - `epochs`: recovery by training, over the whole run: every step gets ``epochs // steps``, the last the rest as
      well.
    - `distil`: the unpruned network teaches during recovery. `recalibrate`: batch-norm statistics are taken anew on
      training images after each cut.
    - `constraints`: what every cut keeps to, in a line: ``"multiple_of=8, minimum=16, whole_heads, keep stem*"``
      (`convette.surgery.WidthConstraints`).
    - `multiple_of`: channels stay in multiples of this. `min_fraction`: this share of every group's units stays at
      least.
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
    steps: int = 5
    epochs: int = 3
    distil: bool = True
    recalibrate: bool = True
    constraints: str = ""
    multiple_of: int = 1
    min_fraction: float | int = 0.1
    calibration_images: int = 256
    predictor: Literal["macs", "latency_table"] = "macs"
    latency_margin: float | int = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.criterion, self.criterion_options)
        find_allocation(self.allocation)
        if self.predictor not in ("macs", "latency_table"):
            raise UsageError(f"prune.predictor = {self.predictor!r}: macs or latency_table is needed.")
        if self.predictor == "latency_table" and self.allocation in ONLY_COUNTED:
            raise UsageError(
                f"prune.allocation = {self.allocation!r} needs a cost it can count; with a latency table use opti_cut."
            )
        for name, least in (("steps", 1), ("epochs", 0), ("multiple_of", 1), ("calibration_images", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"prune.{name} = {getattr(self, name)}: at least {least} is needed.")
        try:
            WidthConstraints.parse(self.constraints)
        except UsageError as error:
            raise UsageError(f"prune.constraints = {self.constraints!r}: {error}") from error
        if not 0 <= self.min_fraction <= 1:
            raise UsageError(f"prune.min_fraction = {self.min_fraction}: a share between 0 and 1 is needed.")
        if not 0 <= self.latency_margin < 0.5:
            raise UsageError(f"prune.latency_margin = {self.latency_margin}: a share between 0 and 0.5 is needed.")

    @property
    def least_share(self) -> float:
        """The share of every group's units that stays, by `min_fraction` and by the constraints."""
        minimum = WidthConstraints.parse(self.constraints).minimum
        return max(float(self.min_fraction), minimum if isinstance(minimum, float) and minimum <= 1 else 0.0)

    def epochs_of(self, step: int) -> int:
        """Return the recovery epochs of `step` (1-based); the network at its final size gets the remainder."""
        share, rest = divmod(self.epochs, self.steps)
        return share + rest if step == self.steps else share
