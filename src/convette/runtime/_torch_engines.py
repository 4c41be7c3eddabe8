"""Running a network on PyTorch itself: eager, or compiled by TorchInductor."""

import copy
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from convette.errors import ConvetteError, UsageError
from convette.runtime import _vendors
from convette.runtime.engines import EngineSpec, Prepared


def make(spec: EngineSpec, source: nn.Module, example: np.ndarray, threads: int) -> Prepared:
    """Return the function that runs `source` on PyTorch as `spec` says."""
    started = time.perf_counter()
    channels_last = (spec.channels_last or spec.engine == "compiled") and example.ndim == 4
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    model = copy.deepcopy(source).eval().requires_grad_(False)
    model = model.to(device=spec.device, dtype=dtype).to(memory_format=memory_format)  # type: ignore[call-overload]

    def run(batch: np.ndarray, network: Callable[..., Any] = model) -> np.ndarray:
        with _thread_count(threads), torch.no_grad():
            images = torch.from_numpy(batch).to(device=spec.device, dtype=dtype)
            output = network(images.contiguous(memory_format=memory_format))
            return output.float().cpu().numpy()

    if spec.engine == "compiled":
        run = _compiled(model, run, example)
    return Prepared(run, spec.precision or "fp32", started)


def compiler_missing() -> str | None:
    """Return why torch.compile cannot work for the CPU here, or None."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++").split()
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "CXX (empty)"
        return (
            f"torch.compile needs a C++ compiler and {name} is not there; install g++ (or set CXX), or use eager:cpu."
        )
    return None


def _compiled(model: nn.Module, run: Callable[..., np.ndarray], example: np.ndarray) -> Callable[..., np.ndarray]:
    import torch._dynamo.config
    import torch._inductor.config

    # One graph for exactly this shape: the fastest, and one compilation instead of one a batch size.
    compiled = torch.compile(model, dynamic=False, fullgraph=False)
    size = len(example)

    def call(batch: np.ndarray) -> np.ndarray:
        if len(batch) == size:
            return run(batch, compiled)
        return np.concatenate([_padded(part, size, call) for part in np.split(batch, range(size, len(batch), size))])

    try:
        # Freezing (weights as constants, batch norm folded, layouts chosen) is read while the first call compiles.
        # Dynamo counts all networks of a class as recompilations of one function and gives up, silently, after eight.
        limits = {"recompile_limit": 10_000, "accumulated_recompile_limit": 10_000, "fail_on_recompile_limit_hit": True}
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(**limits), _vendors.quiet():
            call(example)
    except Exception as error:
        raise ConvetteError(
            f"torch.compile cannot compile {type(model).__name__}: {_vendors.one_line(error)}. Use eager:cpu."
        ) from error
    return call


def _padded(part: np.ndarray, size: int, call: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    rows = len(part)
    if rows == 0:
        raise UsageError("the batch is empty; at least one image is needed.")
    if rows < size:
        part = np.concatenate([part, np.repeat(part[-1:], size - rows, axis=0)])
    return call(part)[:rows]


class _thread_count:
    """Torch's thread count while a call runs; it is one number for the whole process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.before != self.threads:
            torch.set_num_threads(self.threads)

    def __exit__(self, *exception: object) -> None:
        if self.before != self.threads:
            torch.set_num_threads(self.before)
