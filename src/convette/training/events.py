"""The points of a training at which methods act, and the order in which they do.

Events nest: at a ``BEFORE_*`` or ``*_START`` event methods run in their declared order, at an ``AFTER_*`` or ``*_END``
event in reverse, so that the method that acts first on the way in acts last on the way out. The pattern (events, state,
methods) follows Composer's; the ordering here is declared by each method, never by who registered first.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from convette.errors import UsageError

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class Event(enum.Enum):
    """A moment of training. In the order in which they come."""

    __hash__ = object.__hash__  # members are single objects; looked up a dozen times a step

    SETUP = "setup"  # before the optimiser exists: taps, adapters and other networks are made here
    BEFORE_LOAD = "before_load"  # a checkpoint is about to be restored
    AFTER_LOAD = "after_load"
    FIT_START = "fit_start"
    STAGE_START = "stage_start"  # optimiser and schedule of the stage exist
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"  # one optimiser step begins
    AFTER_TRANSFORM = "after_transform"  # state.images and state.targets are on the device, augmented, normalised
    BEFORE_FORWARD = "before_forward"
    AFTER_FORWARD = "after_forward"  # state.outputs
    BEFORE_LOSS = "before_loss"
    AFTER_LOSS = "after_loss"  # add or weigh loss terms here
    BEFORE_BACKWARD = "before_backward"
    AFTER_BACKWARD = "after_backward"
    GRADIENTS_READY = "gradients_ready"  # all passes of the step done, synchronised, not yet clipped
    BEFORE_OPTIMIZER_STEP = "before_optimizer_step"  # clipped
    AFTER_OPTIMIZER_STEP = "after_optimizer_step"
    BATCH_END = "batch_end"
    STRUCTURE_CHANGED = "structure_changed"  # after Trainer.edit_structure; state.change says what
    EVALUATION_START = "evaluation_start"
    EVALUATION_END = "evaluation_end"
    EPOCH_END = "epoch_end"
    CHECKPOINT = "checkpoint"  # a checkpoint is about to be written
    STAGE_END = "stage_end"
    FIT_END = "fit_end"


_WAY_OUT = frozenset(event for event in Event if event.value.startswith("after_") or event.value.endswith("_end"))


@runtime_checkable
class Method(Protocol):
    """What a plug-in of the trainer is: a name, an order, and something to do at some events.

    Subclass it and override what differs. `name` is unique in a run. Lower `order` acts first on the way in and last
    on the way out; equal orders go by name. `conflicts` and `requires` name other methods. `events` lists the events
    `apply` wants: the others cost nothing.
    """

    name: str = "method"
    order: int = 0
    events: frozenset[Event] = frozenset()
    conflicts: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    changes_structure: bool = False

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Act at `event`; everything about the run is in ``trainer.state``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: nested dicts and lists of tensors, numbers, strings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def in_order(methods: Iterable[Method]) -> tuple[Method, ...]:
    """Return `methods` sorted by their declared order, whatever order they came in.

    Raises `UsageError` when two share a name, when one conflicts with another, or when a required one is missing.
    """
    ordered = tuple(sorted(methods, key=lambda method: (method.order, method.name)))
    names = [method.name for method in ordered]
    for method in ordered:
        if names.count(method.name) > 1:
            raise UsageError(f"two methods are named {method.name!r}; give one of them another name.")
        for other in method.conflicts:
            if other in names:
                raise UsageError(f"methods {method.name!r} and {other!r} cannot be used together; leave one out.")
        for other in method.requires:
            if other not in names:
                raise UsageError(f"method {method.name!r} needs method {other!r}, which is missing; add it.")
    return ordered


def by_event(ordered: tuple[Method, ...]) -> dict[Event, tuple[Method, ...]]:
    """Return for each event the methods that want it, in the order in which they act there."""
    table = {}
    for event in Event:
        wanting = tuple(method for method in ordered if event in method.events)
        table[event] = wanting[::-1] if event in _WAY_OUT else wanting
    return table
