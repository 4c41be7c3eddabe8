"""The largest MACs at which a cost that has to be measured stays below its limit."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CapPoint:
    """A tried cap on MACs, and the measured cost there as a share of its limit (met: at most 1)."""

    cap: float
    share: float


def search_cap(
    share_at: Callable[[float], float],
    low: CapPoint,
    high: CapPoint,
    *,
    guess: float | None = None,
    margin: float = 0.03,
    attempts: int = 8,
    resolution: float = 0.01,
) -> tuple[CapPoint, tuple[CapPoint, ...]]:
    r"""Find the largest cap x with ``share_at(x) <= 1``, between `low` (met) and `high` (missed), by regula falsi.

    .. math:: x' = x_l + (x_h - x_l)\,\frac{(1 - margin) - f_l}{f_h - f_l}

    kept 5 % away from both ends, since measured cost is a noisy staircase, not a line; after two steps from the same
    side it halves the interval instead. Starts at `guess` if given. Stops when a met share is within ``2 * margin`` of
    the limit, when the interval is below `resolution` of `high`, or after `attempts` measurements.

    Returns the best point that was met (`low` if no other) and all points tried, in order.
    """
    best, tried, target = low, [], 1 - margin
    same_side, last_met = 0, None
    while len(tried) < attempts and high.cap - low.cap > resolution * high.cap:
        if guess is not None and low.cap < guess < high.cap:
            cap, guess = guess, None
        else:
            span = high.cap - low.cap
            step = (target - low.share) / max(high.share - low.share, 1e-9)
            cap = low.cap + span * (0.5 if same_side >= 2 else min(max(step, 0.05), 0.95))
        point = CapPoint(cap, share_at(cap))
        tried.append(point)
        met = point.share <= 1
        same_side, last_met = (same_side + 1 if met == last_met else 1), met
        if met:
            best = low = point
            if point.share >= 1 - 2 * margin:
                break
        else:
            high = point
    return best, tuple(tried)
