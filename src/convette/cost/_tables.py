"""Figures and costs as people read them: numbers with units, rich tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convette.cost._cost import CONVENTION, Cost, LayerCost
from convette.errors import UsageError
from convette.runtime import Latency

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def format_count(value: int | float) -> str:
    """A count with three or four digits and K, M, G or T: 1814073344 is "1.814 G"."""
    for factor, unit in _DECIMAL:
        # What rounds up to a thousand of the next smaller unit is written in this one.
        if abs(value) >= 0.99995 * factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g}"


def format_bytes(value: int | float) -> str:
    """Bytes with decimal units: 46827520 is "46.83 MB"."""
    text = format_count(value)
    return f"{text}B" if " " in text else f"{text} B"


def format_milliseconds(value: int | float) -> str:
    """Milliseconds as s, ms or us, whichever reads best: 0.0421 is "42.1 us"."""
    if abs(value) >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if abs(value) >= 0.1 else f"{value * 1000:.3g} us"


def format_figure(metric: str, value: int | float) -> str:
    """The value of a metric ("macs", "latency.p95@openvino:cpu" ...) with its unit."""
    name = metric.partition("@")[0].partition(".")[0]
    formatter = {"latency": format_milliseconds, "size": format_bytes, "memory": format_bytes}.get(name, format_count)
    return formatter(value)


def format_shape(shape: tuple[int, ...]) -> str:
    """A shape as text: "1x64x56x56"."""
    return "x".join(map(str, shape))


def cost_table(cost: Cost, everything: bool = False) -> Any:
    """One row a layer with totals below; the caption states the convention and what is not in the figures.

    Layers without MACs (normalisations and the like) share the last row and what norm and bias add is in the caption,
    unless `everything` is asked for: then each has its row, and norm and bias their columns.
    """
    from rich.table import Table

    rows = list(cost.layers)
    others = [layer for layer in rows if not layer.macs]
    if not everything and others:
        rows = [*(layer for layer in rows if layer.macs), _together(others)]
    table = Table(title=f"Cost on {cost.inputs}" if cost.inputs else "Cost", caption=_caption(cost), show_footer=True)
    table.add_column("layer", footer="total", overflow="fold", min_width=12)
    table.add_column("kind", overflow="fold")
    table.add_column("output", overflow="fold")
    figures = {"parameters": cost.parameters, "MACs": cost.macs}
    for title, total in figures.items():
        table.add_column(title, justify="right", footer=format_count(total), no_wrap=True)
    table.add_column("share", justify="right", footer="100 %" if cost.macs else "", no_wrap=True)
    for title, total in (("norm", cost.norm_macs), ("bias", cost.bias_macs)) if everything else ():
        table.add_column(title, justify="right", footer=format_count(total), no_wrap=True)
    for layer in rows:
        share = f"{100 * layer.macs / cost.macs:.1f} %" if layer.macs and cost.macs else ""
        apart = (layer.norm_macs, layer.bias_macs) if everything else ()
        values = [format_count(x) if x else "" for x in (layer.parameters, layer.macs, *apart)]
        name, shape = layer.name or "(network)", format_shape(layer.output_shape)
        table.add_row(name, layer.kind, shape, *values[:2], share, *values[2:])
    return table


def _caption(cost: Cost) -> str:
    uncounted = f"Without a formula, not counted: {', '.join(cost.uncounted)}. " if cost.uncounted else ""
    families = ", ".join(f"{family} {format_count(macs)}" for family, macs in cost.families.items())
    return (
        f"{uncounted}Weights {format_bytes(cost.size)} ({format_bytes(cost.buffer_size)} of it buffers), "
        f"peak activations {format_bytes(cost.memory)}. MACs: {families or 'none'}; apart from them norm "
        f"{format_count(cost.norm_macs)}, bias {format_count(cost.bias_macs)}. {CONVENTION}"
    )


def _together(layers: Sequence[LayerCost]) -> LayerCost:
    kinds = sorted({layer.kind for layer in layers})
    return LayerCost(
        name=f"{len(layers)} others",
        kind=", ".join(kinds[:2]) + (" ..." if len(kinds) > 2 else ""),
        macs=0,
        parameters=sum(layer.parameters for layer in layers),
        output_shape=(),
        norm_macs=sum(layer.norm_macs for layer in layers),
        bias_macs=sum(layer.bias_macs for layer in layers),
    )


def engine_table(latencies: Mapping[str, Latency], reference: str | None = None) -> Any:
    """One row an engine, fastest first: p50 with its 95 % interval, p95, p99, cold start, speed-up over `reference`.

    `reference` is by default the first eager engine; without one there is no speed-up. The caption says batch,
    threads, number of calls and the load of the machine.

    Raises:
        UsageError: nothing was measured, or `reference` was not.
    """
    from rich.table import Table

    if not latencies:
        raise UsageError("No latency was measured; name an engine, for example eager:cpu.")
    reference = reference or next((name for name in latencies if name.startswith("eager")), None)
    if reference is not None and reference not in latencies:
        raise UsageError(f"No latency was measured on {reference!r} (measured: {', '.join(latencies)}).")
    some = next(iter(latencies.values()))
    samples = sorted({x.samples for x in latencies.values()})
    counted = f"{samples[0]} to {samples[-1]}" if len(samples) > 1 else f"{samples[0]}"
    caption = (
        f"batch {some.batch_size}, {some.threads} thread{'s' if some.threads != 1 else ''}, "
        f"{counted} calls, interleaved; load of the machine before {some.load_average:.2f}; "
        "p50 with its 95 % interval"
    )
    table = Table(title="Latency", caption=caption)
    for title in ("engine", "computes in"):
        table.add_column(title)
    for title in ("p50", "p95", "p99", "cold start"):
        table.add_column(title, justify="right")
    if reference is not None:
        table.add_column(f"speed-up over {reference}", justify="right")
    for name, x in sorted(latencies.items(), key=lambda item: item[1].p50):
        low, high = (format_milliseconds(value) for value in x.p50_interval)
        speedup = [f"{latencies[reference].p50 / x.p50:.2f}x"] if reference is not None else []
        rest = (format_milliseconds(value) for value in (x.p95, x.p99, x.cold_start))
        table.add_row(name, x.precision, f"{format_milliseconds(x.p50)} ({low} to {high})", *rest, *speedup)
    return table


def comparison_table(costs: Mapping[str, Cost]) -> Any:
    """One column a network, one row a figure; behind each figure its share of that of the first network.

    Raises:
        UsageError: no cost was given.
    """
    from rich.table import Table

    if not costs:
        raise UsageError("There is no cost to compare.")
    first = next(iter(costs.values()))
    table = Table(title="Cost", caption=CONVENTION)
    table.add_column("figure")
    for name in costs:
        table.add_column(name, justify="right")
    names = dict.fromkeys(name for cost in costs.values() for name in cost.figures())
    for figure in names:
        cells = []
        for cost in costs.values():
            value, share = cost.figures().get(figure), cost.relative_to(first).get(figure)
            text = "" if value is None else format_figure(figure, value)
            cells.append(f"{text} ({100 * share:.1f} %)" if share is not None and cost is not first else text)
        table.add_row(figure, *cells)
    return table


def status_table(statuses: Iterable[Any], start: Cost | None = None) -> Any:
    """The statuses of a budget (`Budget.check`) as a table: metric, start, limit, value, met."""
    from rich.table import Table

    from convette.cost._budget import status_rows

    table = Table(title="Budget")
    columns = ["metric", *(["start"] if start else []), "limit", "value", *(["share"] if start else []), "met"]
    for name in columns:
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in status_rows(statuses, start):
        table.add_row(*(row[name] for name in columns))
    return table
