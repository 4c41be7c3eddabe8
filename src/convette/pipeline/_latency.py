"""Latency before and after, measured together: training gives float32, precision is one of the ways to a budget."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convette.runtime import ENGINES, EngineSpec, Latency, measure_latency, prepare


def in_float32(engine: str) -> str:
    """Return `engine` computing in float32, unless a precision is named in it.

    OpenVINO takes bfloat16 by itself where the processor has it. A limit such as ``latency<=50%@openvino:cpu`` is
    relative to the network as it was trained, in float32; ``latency<=50%@openvino:cpu:bf16`` compares in bfloat16.
    """
    spec = EngineSpec.parse(engine)
    if spec.precision is None and "fp32" in ENGINES[spec.engine].precisions:
        return str(replace(spec, precision="fp32"))
    return engine


def measure_from_start(networks: Mapping[str, nn.Module], example: Any, engine: str) -> dict[str, Latency]:
    """Measure `networks` on `engine`, interleaved; the one named "start" in float32. For `convette.prune`."""
    return _measure(
        {name: (in_float32(engine) if name == "start" else engine, network) for name, network in networks.items()},
        example,
    )


def measure_both(
    before: nn.Module, after: nn.Module, example: Tensor, engines: Sequence[str], files: Mapping[str, Path]
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
    measured = _measure(runs, example)
    return {which: {engine: measured[f"{which} {engine}"] for engine in engines} for which in ("before", "after")}


def _measure(runs: Mapping[str, tuple[str, Any]], example: Any) -> dict[str, Latency]:
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(prepare(engine, source, example)) for name, (engine, source) in runs.items()
        }
        return measure_latency(runners, example)
