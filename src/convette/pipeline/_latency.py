"""Latency before and after, measured together: training gives float32, precision is one of the ways to a budget.

Everything is measured under the background load the recipe asks for (``run.contention``).
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette.runtime import ENGINES, EngineSpec, Latency, contention, measure_latency, prepare

TAIL_SAMPLES = 2000  # of 500 calls, the five slowest decide the p99; limits are to hold when measured again


def in_float32(engine: str) -> str:
    """Return `engine` computing in float32, unless a precision is named in it.

    OpenVINO takes bfloat16 by itself where the processor has it. A limit such as ``latency<=50%@openvino:cpu`` is
    relative to the network as it was trained, in float32; ``latency<=50%@openvino:cpu:bf16`` compares in bfloat16.
    """
    spec = EngineSpec.parse(engine)
    if spec.precision is None and "fp32" in ENGINES[spec.engine].precisions:
        return str(replace(spec, precision="fp32"))
    return engine


def measure_from_start(
    networks: Mapping[str, nn.Module], example: Any, engine: str, *, load: int = 0, samples: int = 50
) -> dict[str, Latency]:
    """Measure `networks` on `engine`, interleaved; the one named "start" in float32. For `convette.prune`."""
    return measure_runs(
        {name: (in_float32(engine) if name == "start" else engine, network) for name, network in networks.items()},
        example,
        load,
        samples,
    )


def measurer(budget: Any, load: int) -> Callable[..., dict[str, Latency]]:
    """Return `measure_from_start` under `load` background processes, with enough calls for the percentiles limited."""
    return partial(measure_from_start, load=load, samples=samples_for(budget))


def samples_for(budget: Any) -> int:
    """Return how many calls the latency limits of `budget` (None: no budget) need at least."""
    tail = budget is not None and any(limit.percentile in ("p95", "p99") for limit in budget.limits)
    return TAIL_SAMPLES if tail else 50


def measure_both(
    before: nn.Module,
    after: nn.Module,
    example: Tensor,
    engines: Sequence[str],
    files: Mapping[str, Path],
    *,
    load: int = 0,
    samples: int = 50,
) -> dict[str, dict[str, Latency]]:
    """Measure two networks on every engine, all interleaved in one run: ``result["before"][engine]``, "after" likewise.

    The one before runs in float32; `files` names the int8 file to run in place of the one after on an engine.
    """
    if not engines:
        return {"before": {}, "after": {}}
    runs: dict[str, tuple[str, nn.Module | Path]] = {}
    for engine in engines:
        runs[f"before {engine}"] = (in_float32(engine), before)
        runs[f"after {engine}"] = (engine, files.get(engine, after))
    measured = measure_runs(runs, example, load, samples)
    return {which: {engine: measured[f"{which} {engine}"] for engine in engines} for which in ("before", "after")}


def threads_beside(load: int) -> int | None:
    """Return the threads of engines beside `load` busy processes: as many as cores are free (None: no load).

    At most torch's, at least one. A thread that shares its core with a busy process keeps all others waiting for whole
    time slices, which is what a p99 is made of.
    """
    if load == 0:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores - load))


def measure_runs(
    runs: Mapping[str, tuple[str, nn.Module | Path]], example: Any, load: int = 0, samples: int = 50
) -> dict[str, Latency]:
    """Measure ``name -> (engine, network or file)`` interleaved, beside `load` busy processes (`threads_beside`)."""
    threads = threads_beside(load)
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(prepare(engine, source, example, threads=threads))
            for name, (engine, source) in runs.items()
        }
        stack.enter_context(contention(load))
        return measure_latency(runners, example, minimum_samples=samples)
