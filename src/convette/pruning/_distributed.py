"""Under torchrun: rank 0 decides, the others follow, all stay identical."""

from collections.abc import Callable
from typing import Any

from torch import nn

from convette import errors
from convette.training import distributed


def decided_by_main_rank(decide: Callable[[], Any]) -> Any:
    """Run ``decide()`` on rank 0 and return its result (numbers, strings, lists, dicts of them) on every rank.

    An error of convette on rank 0 is raised on every rank, so that none waits for a decision that will not come.
    """
    if distributed.world_size() == 1:
        return decide()
    message: dict[str, Any] = {}
    if distributed.is_main():
        try:
            message = {"value": decide()}
        except errors.ConvetteError as error:
            message = {"error": type(error).__name__, "text": str(error)}
    message = distributed.broadcast(message)
    if "error" in message:
        raise getattr(errors, message["error"], errors.ConvetteError)(message["text"])
    return message["value"]


def copy_from_main_rank(model: nn.Module) -> None:
    """Overwrite the parameters and buffers of `model` on every rank by those of rank 0."""
    distributed.broadcast_tensors([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])
