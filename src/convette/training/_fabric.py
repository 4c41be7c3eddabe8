"""The only module that knows Lightning Fabric: devices, precision, DDP and torchrun behind a dozen functions."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.training import distributed

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on: ``"auto"`` is this process's CUDA device where there is one, else the CPU.

    Under torchrun, ``"auto"`` and ``"cuda"`` are the GPU numbered by LOCAL_RANK. Raises `UsageError` for a device that
    does not exist on this machine.
    """
    if isinstance(device, torch.device):
        wanted = device
    elif device == "auto":
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            wanted = torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:0.") from error
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {device!r}: no CUDA device is visible; use device='cpu' or 'auto'.")
        index = wanted.index if wanted.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UsageError(f"device 'cuda:{index}' does not exist: {torch.cuda.device_count()} CUDA devices visible.")
        wanted = torch.device("cuda", index)
    return wanted


def start_distributed(device: str | torch.device = "auto") -> None:
    """Join the other processes of a torchrun run, once; does nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and distributed.world_size() == 1:
        FabricAdapter(resolve_device(device))


class FabricAdapter:
    """Device, precision and data parallelism of one run.

    The number of devices and nodes comes from the environment torchrun sets, never from a configuration.
    `precision` is ``"fp32"`` or ``"bf16"`` (mixed: weights stay fp32, the forward pass runs under autocast).
    """

    def __init__(self, device: torch.device, precision: str = "fp32") -> None:
        from lightning_fabric import Fabric

        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # importing it sets INFO
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several else 1
        devices: Any = local if several or device.index is None else [device.index]
        joined = distributed.world_size() > 1
        self.precision = precision
        self._fabric = Fabric(
            accelerator=device.type,
            strategy="ddp" if several else "auto",
            devices=devices,
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")) if several else 1,
            precision=_PRECISIONS[precision],  # type: ignore[arg-type]
        )
        self._fabric.launch()
        # One process in fp32: Fabric's wrappers have nothing to do, but cost a tenth of a millisecond a step.
        self._bare = self._fabric.world_size == 1 and precision == "fp32"
        if several and not joined:
            distributed.leave_at_exit()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._fabric.device

    @property
    def rank(self) -> int:
        """Index of this process among all."""
        return self._fabric.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._fabric.world_size

    def with_precision(self, precision: str) -> "FabricAdapter":
        """Return an adapter for the same device and processes with another precision."""
        return self if precision == self.precision else FabricAdapter(self.device, precision)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the callable that runs `model` with this precision and, among several ranks, under DDP."""
        return model.to(self.device) if self._bare else self._fabric.setup_module(model)

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the object whose ``step()`` carries out `optimizer`'s step."""
        return optimizer if self._bare else self._fabric.setup_optimizers(optimizer)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass from `loss`."""
        if self._bare:
            loss.backward()
        else:
            self._fabric.backward(loss)

    def clip_gradients(self, wrapper: Any, optimizer: Any, max_norm: float) -> Tensor:
        """Scale the gradients of `optimizer` down to the total 2-norm `max_norm`; returns the norm before."""
        norm = self._fabric.clip_gradients(wrapper, optimizer, max_norm=max_norm, error_if_nonfinite=False)
        return norm if norm is not None else torch.zeros(())

    def without_sync(self, wrapper: Any, enabled: bool) -> contextlib.AbstractContextManager:
        """Context in which a backward pass leaves gradients local (all but the last part of an accumulation)."""
        if not enabled or self.world_size == 1:
            return contextlib.nullcontext()
        return self._fabric.no_backward_sync(wrapper)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context that gives other networks (a teacher, the EMA copy) the precision of the trained one."""
        with self._fabric.autocast():
            yield
