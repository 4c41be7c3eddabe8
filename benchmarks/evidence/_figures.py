"""What the evidence scripts say alike: means with intervals over seeds, paired differences, the result file."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from convette._files import write_json
from convette._provenance import provenance

RESULTS = Path(__file__).parent / "results"
Figures = dict[str, float]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t; 0 for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, half


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the differences, paired by seed."""
    return [a - b for a, b in zip(values, base, strict=True)]


def shown(values: Sequence[float], factor: float = 1.0, digits: int = 1) -> str:
    """Return mean and interval as text."""
    mean, half = interval(values)
    return f"{factor * mean:.{digits}f} ± {factor * half:.{digits}f}"


def paired(values: Sequence[float], base: Sequence[float], factor: float = 100.0) -> str:
    """Return the paired difference with its interval as text."""
    mean, half = interval(differences(values, base))
    return f"{factor * mean:+.1f} ± {factor * half:.1f}"


def gained(values: Sequence[float], base: Sequence[float]) -> str:
    """Return the paired difference of two shares in points, with its interval."""
    mean, half = interval(differences(values, base))
    return f"{100 * mean:+.1f} points (95 % interval {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"


def against(values: Sequence[float], base: Sequence[float], digits: int = 1) -> str:
    """Return the paired difference in words: mean and 95 % interval, and whether it can be told from chance."""
    mean, half = interval(differences(values, base))
    verdict = "beyond chance" if abs(mean) > half else "not to be told from chance"
    return f"{mean:+.{digits}f} (95 % interval {mean - half:+.{digits}f} to {mean + half:+.{digits}f}, {verdict})"


def told(found: Mapping[str, list[Figures]], method: str, baseline: str, key: str, points: bool = True) -> str:
    """Return the paired difference of a figure of two arms in a sentence, in points of a share."""
    mean, half = interval(differences([a[key] for a in found[method]], [b[key] for b in found[baseline]]))
    factor = 100 if points else 1
    verdict = "no difference can be told from chance" if abs(mean) <= half else "a difference beyond chance"
    unit = " points" if points else ""
    low, high = factor * (mean - half), factor * (mean + half)
    what = f"{method} against {baseline}, {key}: {factor * mean:+.2f}{unit}"
    return f"{what} (95 % interval {low:+.2f} to {high:+.2f}): {verdict}."


def write_rows(
    slug: str, started: float, summary: str, columns: list[str], rows: Mapping[str, list[str]], **raw: Any
) -> None:
    """Write ``results/<slug>.json`` from cells as they are shown."""
    body = {"slug": slug, "summary": summary, "columns": columns, "rows": dict(rows), **raw}
    write_json(RESULTS / f"{slug}.json", body | provenance(time.monotonic() - started))


def write_runs(
    slug: str,
    summary: str,
    found: Mapping[str, list[Figures]],
    started: float,
    *,
    shares: Sequence[str],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results/<slug>.json`` from the figures of every arm and seed: `shares` are shown in per cent."""
    columns = list(next(iter(found.values()))[0])
    rows = {}
    for name, runs in found.items():
        cells = []
        for key in columns:
            mean, half = interval([run[key] for run in runs])
            factor = 100 if key in shares else 1
            cells.append(f"{factor * mean:.4g}" + (f" ± {factor * half:.2g}" if half else ""))
        rows[name] = cells
    titles = [f"{key}, %" if key in shares else key for key in columns]
    result = {"summary": summary, "columns": titles, "rows": rows, "settings": dict(settings), "runs": dict(found)}
    write_json(RESULTS / f"{slug}.json", result | dict(extra or {}) | provenance(time.monotonic() - started))
