"""Limits that have to be measured on a network that exists: latency on an engine, memory."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from convette.cost import DEFAULT_ENGINE, Limit, count
from convette.runtime import Latency, measure_latency, prepare

MEASURED = ("latency", "memory")
Measure = Callable[[Mapping[str, nn.Module], Any, str], Mapping[str, Latency]]


def measure_latencies(
    networks: Mapping[str, nn.Module], example: Any, engine: str, *, time_limit: float = 3.0
) -> dict[str, Latency]:
    """Measure the latency of `networks` on `engine`, interleaved in one run, so that what disturbs one disturbs all.

    `example`: one input batch, on any device. `time_limit`: seconds for each network at most.
    """
    runners = {}
    try:
        for name, network in networks.items():
            runners[name] = prepare(engine, copy.deepcopy(network).cpu().eval(), example.cpu())
        return measure_latency(runners, example.cpu(), time_limit=time_limit)
    finally:
        for runner in runners.values():
            runner.close()


def engine_of(limit: Limit) -> str:
    """Return the engine that a latency limit speaks of."""
    return limit.engine or DEFAULT_ENGINE


class MeasuredLimits:
    """The limits of a budget on latency and memory, and the network they are relative to.

    `limits` as the budget states them (a relative latency stays relative: each measurement runs the start beside the
    candidate, so both saw the same machine). `memory_start`: the start's peak memory in bytes.
    """

    def __init__(
        self, limits: Sequence[Limit], parent: nn.Module, example: Any, memory_start: float | int, measure: Measure
    ) -> None:
        self.limits = tuple(limit for limit in limits if limit.metric in MEASURED)
        self.parent, self.example, self.memory_start, self.measure = parent, example, memory_start, measure

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that have to be measured, each once."""
        return tuple(dict.fromkeys(engine_of(limit) for limit in self.limits if limit.metric == "latency"))

    def latencies(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Latency]]:
        """Measure the start and `networks` on every engine: ``result[name][engine]``, the start under "start"."""
        found: dict[str, dict[str, Latency]] = {name: {} for name in ("start", *networks)}
        for engine in self.engines:
            for name, latency in self.measure({"start": self.parent, **networks}, self.example, engine).items():
                found[name][engine] = latency
        return found

    def shares(self, networks: Mapping[str, nn.Module]) -> dict[str, list[tuple[Limit, float, float]]]:
        """Measure `networks`: for each a list of (limit, value, value as a share of its bound; met: at most 1).

        A median counts with the upper end of its interval: what is not known yet is not assumed to be good.
        """
        latencies = self.latencies(networks)
        result: dict[str, list[tuple[Limit, float, float]]] = {}
        for name, network in networks.items():
            rows = []
            for limit in self.limits:
                if limit.metric == "memory":
                    value, start = float(count(network, self.example).memory), self.memory_start
                else:
                    engine = engine_of(limit)
                    value = latencies[name][engine].upper(limit.percentile)
                    start = float(getattr(latencies["start"][engine], limit.percentile or "p50"))
                bound = limit.value * start if limit.relative else limit.value
                rows.append((limit, value, value / bound if bound > 0 else float("inf")))
            result[name] = rows
        return result


def worst(rows: Sequence[tuple[Limit, float, float]]) -> float:
    """Return the largest share of a bound; 0 without limits."""
    return max((share for _, _, share in rows), default=0.0)
