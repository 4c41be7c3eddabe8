import random as chance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convette.pruning._cap_search import CapPoint, search_cap


@given(
    floor=st.floats(0, 0.8), power=st.floats(0.3, 3), steps=st.sampled_from([0, 10, 50]), margin=st.floats(0.01, 0.05)
)
def test_finds_a_cap_that_is_met(floor, power, steps, margin):
    def share(cap: float) -> float:
        at = round(cap * steps) / steps if steps else cap
        return floor + 1.5 * at**power

    if share(1.0) <= 1 or share(0.02) > 1:
        return
    low, high = CapPoint(0.02, share(0.02)), CapPoint(1.0, share(1.0))
    best, tried = search_cap(share, low, high, margin=margin, attempts=12)
    assert share(best.cap) <= 1
    assert len(tried) <= 12
    # Either close below the limit, or a staircase (or the attempts) left no room: nothing tried above is met.
    assert best.share >= 1 - 2 * margin or all(point.share > 1 for point in tried if point.cap > best.cap)


def test_a_good_guess_needs_one_measurement():
    best, tried = search_cap(lambda cap: cap * 2, CapPoint(0.1, 0.2), CapPoint(1.0, 2.0), guess=0.48)
    assert len(tried) == 1 and best.cap == 0.48


def test_noise_never_returns_a_point_that_was_missed():
    noise = chance.Random(0)
    best, tried = search_cap(lambda cap: 0.3 + cap + noise.gauss(0, 0.05), CapPoint(0.05, 0.35), CapPoint(1.0, 1.3))
    assert best.share <= 1
    assert best == CapPoint(0.05, 0.35) or best in tried


def test_nothing_between_is_met():
    best, _ = search_cap(lambda cap: 1.2, CapPoint(0.1, 0.9), CapPoint(1.0, 2.0), attempts=5)
    assert best.cap == pytest.approx(0.1)
