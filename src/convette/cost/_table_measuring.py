"""Measuring a latency table: which layers a network has, their times at a grid of widths, and how well the sum fits."""

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette._progress import progress
from convette.cost._count import Example, record
from convette.cost._widths import WidthCost
from convette.cost.latency_table import Grid, LatencyTable, LayerShape, make_grid
from convette.errors import UsageError
from convette.layers._watching import hooked

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.PReLU)
# Names and what they are, with the input each runs on -> (median, p90, interquartile range) in milliseconds.
Timer = Callable[[Mapping[str, tuple[nn.Module, Tensor]], str], Mapping[str, tuple[float, float, float]]]


@dataclass(frozen=True)
class TabledLayer:
    """One call of a layer: its module's name, its `LayerShape` and its widths now."""

    name: str
    shape: LayerShape
    ins: int
    outs: int


def read_layers(model: nn.Module, example: Example) -> tuple[TabledLayer, ...]:
    """Return every call of a convolution or linear layer in the order of the run, with what runs right behind it.

    Cost: one forward run.
    """
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[tuple[nn.Module, list[int]]] = []

    def note_call(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            calls.append((module, list(inputs[0].shape)))

    leaves = [module for module in model.modules() if not list(module.children())]
    with hooked([module.register_forward_pre_hook(note_call) for module in leaves]):
        record(model, example)
    found = []
    for number, (module, shape) in enumerate(calls):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        norm = number + 1 < len(calls) and isinstance(calls[number + 1][0], nn.BatchNorm2d)
        after = number + 2 if norm else number + 1
        act = calls[after][0] if after < len(calls) and isinstance(calls[after][0], ACTIVATIONS) else None
        found.append(_layer(names[id(module)], module, shape, norm, type(act).__name__ if act is not None else ""))
    return tuple(found)


def _layer(name: str, module: nn.Module, shape: Sequence[int], norm: bool, activation: str) -> TabledLayer:
    if isinstance(module, nn.Linear):
        rows = int(np.prod(shape[1:-1])) if len(shape) > 2 else 1
        key = LayerShape(
            "linear", (1, 1), (1, 1), (0, 0), (1, 1), 1, rows, 1, shape[0], module.bias is not None, norm, activation
        )
        return TabledLayer(name, key, module.in_features, module.out_features)
    assert isinstance(module, nn.Conv2d)
    depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
    padding = module.padding if isinstance(module.padding, tuple) else tuple(k // 2 for k in module.kernel_size)
    key = LayerShape(
        "depthwise" if depthwise else "conv",
        _pair(module.kernel_size),
        _pair(module.stride),
        _pair(padding),
        _pair(module.dilation),
        1 if depthwise else module.groups,
        shape[-2],
        shape[-1],
        shape[0] if len(shape) == 4 else 1,
        module.bias is not None,
        norm,
        activation,
    )
    return TabledLayer(name, key, module.in_channels, module.out_channels)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


def measure_table(
    model: nn.Module,
    example: Tensor,
    engine: str = "eager:cpu",
    *,
    points: int = 4,
    multiple: int = 8,
    threads: int | None = None,
    seconds_each: float = 0.1,
    timer: Timer | None = None,
) -> LatencyTable:
    """Time the layers of `model` on `engine` at `points` widths along each side and return the `LatencyTable`.

    Widths are multiples of `multiple` up to that of the network, spaced evenly, with the smallest and the largest:
    times are staircases whose steps are the vector width. Every layer runs with the norm and activation behind it, as
    fused as the engine makes them; an empty network's time is taken off. Grids of a shape are measured in one
    interleaved run. `seconds_each`: of measuring, for each point. `timer` replaces the clock (tests).

    Raises `UsageError` for an engine this machine lacks. Costs about ``points² × shapes × (seconds_each + preparing)``;
    the table is uncalibrated (`calibrate_table`).
    """
    timer = timer or _engine_timer(threads, seconds_each)
    widest: dict[LayerShape, tuple[int, int]] = {}
    for layer in read_layers(model, example):
        ins, outs = widest.get(layer.shape, (0, 0))
        widest[layer.shape] = (max(ins, layer.ins), max(outs, layer.outs))
    grids: dict[LayerShape, Grid] = {}
    with progress(f"latency table of {engine}", len(widest), "layer shape") as advance:
        for shape, (ins, outs) in widest.items():
            grids[shape] = _measure_grid(shape, ins, outs, points, multiple, engine, timer)
            advance(1, detail=str(shape))
    if not grids:
        raise UsageError("the network has no convolution and no linear layer to make a latency table of.")
    precision, device, used, version = _where(engine, threads)
    return LatencyTable(engine, device, precision, used, version, platform.processor() or platform.machine(), grids)


def _measure_grid(
    shape: LayerShape, ins: int, outs: int, points: int, multiple: int, engine: str, timer: Timer
) -> Grid:
    depthwise = shape.kind == "depthwise"
    columns = grid_points(outs, points, multiple, shape.groups)
    rows = (ins,) if depthwise else grid_points(ins, points, multiple, shape.groups)
    networks: dict[str, tuple[nn.Module, Tensor]] = {"empty": (nn.ReLU().eval(), torch.zeros(1, 1, 1, 1))}
    for a in rows:
        for b in columns:
            networks[f"{a}-{b}"] = _one_layer(shape, b if depthwise else a, b)
    times = timer(networks, engine)
    empty = times["empty"][0]
    table = np.array([[times[f"{a}-{b}"] for b in columns] for a in rows], dtype=float)
    return make_grid(rows, columns, table[..., 0] - empty, table[..., 1] - empty, table[..., 2])


def grid_points(most: int, points: int, multiple: int, groups: int = 1) -> tuple[int, ...]:
    """Return up to `points` widths from small to `most`, multiples of `multiple` (all of `groups`), ascending."""
    step = int(np.lcm(multiple, groups)) if most > 2 * multiple else groups
    wanted = np.linspace(step, most, max(2, points))
    found = {min(most, max(step, round(value / step) * step)) for value in wanted} | {most}
    return tuple(sorted(int(value) for value in found))


def _one_layer(shape: LayerShape, ins: int, outs: int) -> tuple[nn.Module, Tensor]:
    if shape.kind == "linear":
        layer: nn.Module = nn.Linear(ins, outs, bias=shape.bias)
        rows = (shape.batch, shape.height, ins) if shape.height > 1 else (shape.batch, ins)
        example = torch.zeros(rows)
    else:
        groups = outs if shape.kind == "depthwise" else shape.groups
        layer = nn.Conv2d(
            ins, outs, shape.kernel, shape.stride, shape.padding, shape.dilation, groups=groups, bias=shape.bias
        )
        example = torch.zeros(shape.batch, ins, shape.height, shape.width)
    parts: list[nn.Module] = [layer]
    if shape.norm:
        parts.append(nn.BatchNorm2d(outs))
    if shape.activation:
        parts.append(getattr(nn, shape.activation)())
    return nn.Sequential(*parts).eval(), example


def calibrate_table(
    table: LatencyTable,
    model: nn.Module,
    example: Tensor,
    graph: Any,
    *,
    networks: int = 8,
    held_out: int = 6,
    seed: int = 0,
    threads: int | None = None,
    seconds_each: float = 0.5,
    timer: Timer | None = None,
) -> LatencyTable:
    """Return `table` with its fixed time and scale fitted to `networks` copies of `model` at random widths.

    The whole network is one of them. `held_out` more give `error` and `rank_correlation`. All are really shrunk and
    measured in one interleaved run. Costs a cut and ``seconds_each`` of measuring for each.
    """
    from convette.surgery import apply

    cost = LatencyCost(model, example, graph, table)
    generator = torch.Generator().manual_seed(seed)
    selections = [{}, *(_random_selection(graph, generator) for _ in range(networks + held_out - 1))]
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    for number, selection in enumerate(selections):
        shrunk = copy.deepcopy(model).cpu().eval()
        if selection:
            apply(shrunk, graph.shrink(selection))
        made[str(number)] = (shrunk, example.cpu())
    times = (timer or _engine_timer(threads, seconds_each))(made, table.engine)
    measured = np.array([times[str(number)][0] for number in range(len(selections))])
    sums = np.array([cost.layer_times(selection) for selection in selections])
    return table.calibrated(sums, measured, held_out)


def _random_selection(graph: Any, generator: torch.Generator) -> dict[str, Tensor]:
    # One share for the whole network, varied a little from group to group: totals spread, shapes differ.
    base = 0.25 + 0.75 * float(torch.rand((), generator=generator))
    selection = {}
    for group in graph.groups:
        parts = group.constraints.parts
        step = int(np.lcm(parts, group.constraints.multiple_of))
        share = min(1.0, base * (0.7 + 0.6 * float(torch.rand((), generator=generator))))
        kept = min(group.size, max(step, round(share * group.size / step) * step, group.constraints.minimum))
        each, per = group.size // parts, kept // parts
        if kept < group.size and per * parts == kept:
            selection[group.name] = torch.cat([torch.arange(per) + part * each for part in range(parts)])
    return selection


class LatencyCost(WidthCost):
    """`WidthCost` that also predicts latency, in milliseconds, from a `LatencyTable`: ``predict("latency", widths)``.

    Predictions never rise when units go, as the table is monotone. Args as `WidthCost`, and the table. Raises
    `UsageError` for a network with layers the table does not hold.
    """

    def __init__(self, model: nn.Module, example: Example, graph: Any, table: LatencyTable) -> None:
        super().__init__(model, example, graph)
        self.table = table
        column = {name: number for number, name in enumerate(self.groups)}
        slopes: dict[tuple[str, int], np.ndarray] = {}
        for group in graph.groups:
            for member in group.members:
                key = (member.parameter, member.dim)
                row = slopes.setdefault(key, np.zeros(len(self.groups)))
                row[column[group.name]] += member.index.shape[1] if member.index.dim() > 1 else 1
        none = np.zeros(len(self.groups))
        self._layers = []
        for layer in read_layers(model, example):
            if layer.shape not in table.grids:
                raise UsageError(
                    f"the latency table of {table.engine} has no {layer.shape} ({layer.name}); measure a table of this"
                    " network at this input."
                )
            ins = none if layer.shape.kind == "depthwise" else slopes.get((f"{layer.name}.weight", 1), none)
            # A grouped convolution's weight holds the channels of one group.
            self._layers.append((layer, ins * layer.shape.groups, slopes.get((f"{layer.name}.weight", 0), none)))

    def latency(self, selection: Mapping[str, Tensor]) -> float:
        """Milliseconds with only the units of `selection` kept."""
        return float(self.table.total(np.array([self.layer_times(selection)]))[0])

    def layer_times(self, selection: Mapping[str, Tensor]) -> float:
        """The added times of the layers at a selection, before `fixed` and `scale`."""
        return float(self._sums(self.widths(selection).numpy()[None].astype(float))[0])

    def predict(self, metric: str, widths: Tensor) -> Tensor:
        """As `WidthCost.predict`, and "latency" (float64)."""
        if metric != "latency":
            return super().predict(metric, widths)
        flat = widths.reshape(-1, len(self.groups)).cpu().numpy().astype(float)
        return torch.from_numpy(self.table.total(self._sums(flat))).reshape(widths.shape[:-1])

    def _sums(self, widths: np.ndarray) -> np.ndarray:
        gone = np.array(self.sizes, dtype=float) - widths
        total = np.zeros(len(widths))
        for layer, ins, outs in self._layers:
            a, b = layer.ins - gone @ ins, layer.outs - gone @ outs
            total += self.table.layer(layer.shape, b if layer.shape.kind == "depthwise" else a, b)
        return total


def _engine_timer(threads: int | None, seconds_each: float) -> Timer:
    def measure_all(
        networks: Mapping[str, tuple[nn.Module, Tensor]], engine: str
    ) -> dict[str, tuple[float, float, float]]:
        import time

        from convette.runtime import prepare
        from convette.runtime.latency import measure

        runners: dict[str, Any] = {}
        try:
            for name, (network, example) in networks.items():
                runners[name] = _Bound(prepare(engine, network, example, threads=threads), example)
            found = measure(
                runners,
                np.zeros((1, 1)),
                time_limit=seconds_each,
                relative_error=0.02,
                minimum_samples=50,
                warmup=None,
                clock=time.perf_counter,
            )
        finally:
            for runner in runners.values():
                runner.runner.close()
        return {name: _three(latency.p50, latency.timings) for name, latency in found.items()}

    return measure_all


def _three(median: float, timings: Sequence[float]) -> tuple[float, float, float]:
    low, high, p90 = np.percentile(np.array(timings), [25, 75, 90])
    return median, float(p90), float(high - low)


class _Bound:
    """A runner with its own input, so that layers of different shapes can be measured in one run."""

    def __init__(self, runner: Any, example: Tensor) -> None:
        self.runner, self.batch = runner, example.numpy()
        self.engine, self.device, self.precision = runner.engine, runner.device, runner.precision
        self.threads, self.cold_start_seconds = runner.threads, runner.cold_start_seconds

    def __call__(self, batch: np.ndarray) -> Any:
        return self.runner(self.batch)


def _where(engine: str, threads: int | None) -> tuple[str, str, int, str]:
    from importlib.metadata import version

    from convette.runtime import prepare

    with prepare(engine, nn.ReLU().eval(), torch.zeros(1, 1, 1, 1), threads=threads) as runner:
        precision, device, used = runner.precision, runner.device, runner.threads
    package = {"openvino": "openvino", "onnxruntime": "onnxruntime"}.get(engine.split(":")[0], "torch")
    return precision, device, used, f"{package} {version(package)}"
