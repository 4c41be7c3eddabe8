"""Measuring latency beside counting, several networks and engines in one interleaved run."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from convette.cost._cost import DEFAULT_ENGINE, Cost
from convette.cost._count import Example, count
from convette.errors import UsageError
from convette.runtime import ENGINES, EngineSpec, Latency, measure_latency, missing, prepare


def measure(
    model: nn.Module,
    example: Example,
    engines: Sequence[str] = (DEFAULT_ENGINE,),
    *,
    threads: int | None = None,
    time_limit: float = 5.0,
    relative_error: float = 0.02,
    minimum_samples: int = 50,
) -> Cost:
    """Count what `model` costs and measure its latency on each of `engines`, interleaved in one run.

    Args:
        model: the network, left as it is.
        example: for the counts as `count` takes it; a latency wants one tensor ``n c h w``.
        engines: as `convette.runtime.EngineSpec.parse` reads them; with none it is `count`.
        threads: CPU threads of every engine; None: those of torch.
        time_limit: seconds of measuring for each engine.
        relative_error: measuring ends when each median is known within this share of it (95 %).
        minimum_samples: calls timed at least (time limit permitting); a p99 wants 500.

    Raises:
        UsageError: unknown engine, one this machine lacks, or an example that is no tensor.
    """
    costs = measure_together(
        {"": model},
        example,
        engines,
        threads=threads,
        time_limit=time_limit,
        relative_error=relative_error,
        minimum_samples=minimum_samples,
    )
    return costs[""]


def measure_together(
    models: Mapping[str, nn.Module],
    example: Example,
    engines: Sequence[str] = (DEFAULT_ENGINE,),
    *,
    threads: int | None = None,
    time_limit: float = 5.0,
    relative_error: float = 0.02,
    minimum_samples: int = 50,
) -> dict[str, Cost]:
    """`measure` for several networks in one run, so that their latencies can be compared: what else the machine does
    hits all alike. Returns the cost of each by its name in `models`."""
    specs = list(dict.fromkeys(str(EngineSpec.parse(engine)) for engine in engines))
    costs = {name: count(model, example) for name, model in models.items()}
    if not specs:
        return costs
    if not isinstance(example, Tensor):
        raise UsageError(f"latency is measured on one tensor (n c h w), not on a {type(example).__name__}; use count.")
    if example.device.type == "meta" or any(p.device.type == "meta" for m in models.values() for p in m.parameters()):
        raise UsageError("nothing runs on the meta device: build the network on the CPU to measure its latency.")
    with contextlib.ExitStack() as stack:
        runners = {
            f"{spec}/{name}": stack.enter_context(prepare(spec, model, example, threads=threads))
            for spec in specs
            for name, model in models.items()
        }
        measured = measure_latency(
            runners,
            example,
            time_limit=time_limit,
            relative_error=relative_error,
            minimum_samples=minimum_samples,
        )
    latencies: dict[str, dict[str, Latency]] = {
        name: {spec: measured[f"{spec}/{name}"] for spec in specs} for name in models
    }
    return {name: replace(cost, latency=latencies[name]) for name, cost in costs.items()}


def available_engines() -> tuple[str, ...]:
    """The engines this machine has, as "engine:device", the default precision of each."""
    general = {name: engine for name, engine in ENGINES.items() if engine.general}
    names = (f"{name}:{device}" for name, engine in general.items() for device in engine.devices)
    return tuple(name for name in names if missing(name) is None)
