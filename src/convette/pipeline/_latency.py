"""Latency before and after, measured together: training gives float32, precision is one of the ways to a budget.

Everything is measured under the background load the recipe asks for (``run.contention``).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convette.runtime import ENGINES, EngineSpec, Latency, contention, measure_latency, prepare

TAIL_SAMPLES = 500  # a p99 of fewer calls says little


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
    return _measure(
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
    runs: dict[str, tuple[str, Any]] = {}
    for engine in engines:
        runs[f"before {engine}"] = (in_float32(engine), before)
        runs[f"after {engine}"] = (engine, files.get(engine, after))
    measured = _measure(runs, example, load, samples)
    return {which: {engine: measured[f"{which} {engine}"] for engine in engines} for which in ("before", "after")}


def _measure(runs: Mapping[str, tuple[str, Any]], example: Any, load: int, samples: int) -> dict[str, Latency]:
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(prepare(engine, source, example)) for name, (engine, source) in runs.items()
        }
        stack.enter_context(contention(load))
        return measure_latency(runners, example, minimum_samples=samples)
