"""The report's charts, each an SVG `data:` URI drawn with matplotlib."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convette.pipeline.results import Epoch, PathPoint, Width
from convette.report._pictures import data_uri

BEFORE, AFTER, LIMIT, INK, GRID = "#9aa5b1", "#0f766e", "#c2410c", "#1f2933", "#e4e7eb"
# Inches at which text of ten points reads as such in the page: a whole column, half a column.
WIDE, HALF = 10.4, 5.4
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.hashsalt": "convette",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple]:
    """Yield a figure and its axes, drawn without pyplot: no window, no state shared with the user."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure) -> str:
    buffer = io.BytesIO()
    # Without the date the same run gives the same file.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def training_curves(epochs: Sequence[Epoch], recovery: Sequence[Epoch] = ()) -> str:
    """Validation and training accuracy and training loss over all epochs, the recovery after a dashed line."""
    rows = [*epochs, *recovery]
    x = np.arange(1, len(rows) + 1)
    loss, train_accuracy, accuracy = (
        np.array([np.nan if value is None else value for value in column], dtype=float)
        for column in (
            [row.train_loss for row in rows],
            [row.train_accuracy for row in rows],
            [row.validation_accuracy for row in rows],
        )
    )
    with _figure(HALF, 3.2) as (figure, axes):
        marker = "o" if len(rows) < 12 else None
        axes.plot(x, 100 * accuracy, color=AFTER, marker=marker, markersize=3, label="validation accuracy")
        if np.isfinite(train_accuracy).any():
            axes.plot(x, 100 * train_accuracy, color=AFTER, alpha=0.4, label="training accuracy")
        axes.set(xlabel="epoch", ylabel="accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        losses = axes.twinx()
        losses.plot(x, loss, color=BEFORE, linestyle=":", label="training loss")
        losses.set_ylabel("loss")
        losses.grid(False)
        if recovery:
            axes.axvline(len(epochs) + 0.5, color=LIMIT, linestyle="--", linewidth=1)
            axes.annotate(
                "compression",
                (len(epochs) + 0.5, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                color=LIMIT,
                fontsize=9,
            )
        handles = axes.get_lines()[: 2 if np.isfinite(train_accuracy).any() else 1] + losses.get_lines()
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=9)
        return _svg(figure)


def accuracy_against_cost(path: Sequence[PathPoint], metric: str, bound: float | None) -> str:
    """Validation accuracy against `metric` ("macs", "parameters", "size", "latency"), by step; limit as a line."""
    from convette.cost import format_figure

    points = [point for point in path if getattr(point, metric) is not None]
    after = [(getattr(p, metric), 100 * p.accuracy) for p in points if p.accuracy is not None]
    with _figure(HALF, 3.2) as (figure, axes):
        axes.plot(*zip(*after, strict=True), color=AFTER, marker="o", label="after recovery")
        raw = [(getattr(p, metric), 100 * p.accuracy_before_recovery) for p in points if p.accuracy_before_recovery]
        if raw:
            axes.scatter(*zip(*raw, strict=True), color=BEFORE, marker="x", label="before recovery")
        if bound is not None:
            axes.axvline(bound, color=LIMIT, linestyle="--", linewidth=1, label="budget")
        axes.set(xlabel=_METRIC_NAMES[metric], ylabel="validation accuracy (%)")
        axes.xaxis.set_major_formatter(lambda value, _: format_figure(metric, value))
        axes.margins(x=0.08, y=0.15)
        axes.legend(fontsize=9)
        return _svg(figure)


_METRIC_NAMES = {"macs": "MACs", "parameters": "parameters", "size": "bytes", "latency": "latency"}


def widths(rows: Sequence[Width]) -> str:
    """Output channels of each layer, before behind after."""
    y = np.arange(len(rows))
    with _figure(WIDE, max(1.6, 0.22 * len(rows) + 0.8)) as (figure, axes):
        axes.barh(y, [row.before for row in rows], color="#d5dbe1", height=0.72, label="before")
        axes.barh(y, [row.after for row in rows], color=AFTER, height=0.72, label="after")
        for position, row in zip(y, rows, strict=True):
            text = f"{row.after} of {row.before}" if row.after else f"left out ({row.before})"
            text = f"{row.after}" if row.after == row.before else text
            axes.text(row.before, position, f" {text}", va="center", fontsize=8)
        axes.set_yticks(y, [row.layer for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("output channels")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
        return _svg(figure)


def confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Rows: what it is; columns: what the network said; colour: share of the row; errors in bold."""
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(0.42 * len(counts) + 1.4, 3.2, 9))
    with _figure(size, size) as (figure, axes):
        axes.imshow(np.sqrt(shares), cmap="GnBu", vmin=0, vmax=1.25)
        ticks = np.arange(len(counts))
        step = max(1, len(counts) // 40)
        axes.set_xticks(
            ticks[::step], list(class_names)[::step], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
        )
        axes.set_yticks(ticks[::step], list(class_names)[::step], fontsize=8)
        if len(counts) <= 30:
            for i, j in zip(*np.nonzero(counts), strict=True):
                weight = "bold" if i != j else "normal"
                color = "white" if shares[i, j] > 0.5 else INK
                axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7, weight=weight, color=color)
        axes.grid(False)
        axes.set(xlabel="predicted", ylabel="true")
        return _svg(figure)


def latency_distributions(timings: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Single timings before and after, a pair of strips an engine, median and 95th percentile marked (log ms)."""
    from matplotlib.ticker import LogLocator

    with _figure(WIDE, 0.95 * len(timings) + 0.9) as (figure, axes):
        generator = np.random.default_rng(0)
        for row, (before, after) in enumerate(timings.values()):
            for offset, values, color in ((-0.18, before, BEFORE), (0.18, after, AFTER)):
                values = np.asarray(values)
                jitter = generator.uniform(-0.11, 0.11, len(values))
                axes.scatter(values, row + offset + jitter, s=5, alpha=0.35, color=color, linewidths=0)
                middle, high = np.percentile(values, [50, 95])
                axes.plot([middle, middle], [row + offset - 0.15, row + offset + 0.15], color=INK, linewidth=1.6)
                axes.plot([high, high], [row + offset - 0.1, row + offset + 0.1], color=INK, linewidth=0.8)
        axes.set_yticks(range(len(timings)), list(timings), fontsize=9)
        axes.set_ylim(len(timings) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("milliseconds, single timings; long stroke: median, short stroke: 95th percentile")
        axes.grid(axis="y", visible=False)
        for color, name in ((BEFORE, "before"), (AFTER, "after")):
            axes.scatter([], [], color=color, s=16, label=name)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
        return _svg(figure)
