"""Several processes as one run: who am I, what did rank 0 decide, is everybody done.

Only `torch.distributed` is used here. Everything also works in a single process, where it does nothing. The process
group itself is started by the Fabric adapter (`start_distributed`) from the environment torchrun sets.
"""

import atexit
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """Index of this process among all processes of the run; 0 in a single process."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes of the run; 1 without torchrun."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, logs and writes files (rank 0)."""
    return rank() == 0


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` on every rank. Decisions that all ranks must share go through here."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=_transport())
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return the list of every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over all ranks; in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of parameters that no DDP wrapper looks after (adapters of a method)."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def broadcast_tensors(tensors: list[torch.Tensor]) -> None:
    """Overwrite `tensors` with rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def finish_distributed() -> None:
    """End a run of several processes: wait for all, then give the process group back. Harmless when there is none."""
    if _active():
        barrier()
        dist.destroy_process_group()


def leave_at_exit() -> None:
    """Give the process group back when the interpreter ends, should nobody have called `finish_distributed`.

    No barrier here: a rank that ends by an error must not wait for the others.
    """
    atexit.register(_leave)


def _leave() -> None:
    if _active():
        dist.destroy_process_group()


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _transport() -> torch.device:
    # NCCL carries device tensors only.
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
