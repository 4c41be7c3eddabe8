"""What the evidence scripts of the rooms quantization and runtime share: means with intervals, shown."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, half


def shown(values: Sequence[float], factor: float = 1.0, digits: int = 1) -> str:
    """Return mean and interval as text."""
    mean, half = interval(values)
    return f"{factor * mean:.{digits}f} ± {factor * half:.{digits}f}"


def paired(values: Sequence[float], base: Sequence[float], factor: float = 100.0) -> str:
    """Return the paired difference with its interval as text."""
    mean, half = interval([a - b for a, b in zip(values, base, strict=True)])
    return f"{factor * mean:+.1f} ± {factor * half:.1f}"
