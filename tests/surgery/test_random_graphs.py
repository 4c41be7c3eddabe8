"""Random networks: grow, take back, shrink, JSON, replay, fold; every one proved in float64.

`check` holds the assertions. Many more networks: ``benchmarks/surgery_random_graphs.py``.
"""

import os

from hypothesis import HealthCheck, given, settings
from tests.surgery.random_graphs import OPERATION_LISTS, OPERATIONS, SEEDS, check


@settings(
    max_examples=int(os.environ.get("CONVETTE_GRAPHS", "500")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(OPERATION_LISTS, SEEDS)
def test_random_networks(operations, seed):
    assert check(operations, seed) in ("grown", "refused", "not tried")


def test_nearly_all_networks_grow():
    outcomes = [check([OPERATIONS[k % len(OPERATIONS)], OPERATIONS[7 * k % len(OPERATIONS)]], k) for k in range(60)]
    assert outcomes.count("grown") >= 30 and outcomes.count("refused") <= 2
