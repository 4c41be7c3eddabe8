"""What the trainer asks of a task."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Task(Protocol):
    """Outputs and targets of one kind, the loss between them and the figures that say how good the outputs are."""

    name: str

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Return the scalar to be minimised."""
        ...

    def metrics(self, outputs: Any, targets: Any) -> Any:
        """Return the figures of a whole split, as a frozen dataclass of the task's own."""
        ...

    def check_outputs(self, outputs: Any) -> None:
        """Raise `UsageError`, with the remedy, where the network's head does not fit the task."""
        ...
