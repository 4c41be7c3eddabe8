"""Random networks by the ten thousand: trace, grow, take back, shrink, JSON, replay, fold, each proved in float64.

    python benchmarks/surgery_random_graphs.py --graphs 20000 --seed 1
    python benchmarks/surgery_random_graphs.py --operations '["pad", "shared"]' --network 241789    # one again

The networks are drawn by Hypothesis with the strategies of the tests (tests/surgery/random_graphs.py), 250 at a time,
each portion from a seed of its own, so that a run that is stopped goes on where it was. Hypothesis shrinks what fails
to a small network; it is recorded with its operations and its number, and the run goes on.

Writes benchmarks/results/surgery_random_graphs.json.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from tests.surgery.random_graphs import OPERATION_LISTS, SEEDS, check  # noqa: E402

from convette._files import write_json  # noqa: E402
from convette._provenance import provenance  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "surgery_random_graphs.json"
PORTION = 250


def portion(number: int, of_run: int, size: int) -> dict:
    """Check `size` networks; return how many there were, what growing came to, and the first that failed, if any."""
    counts = {"graphs": 0, "grown": 0, "refused": 0, "not tried": 0}
    last: dict = {}

    @seed(of_run * 100_003 + number)
    @settings(
        max_examples=size,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(OPERATION_LISTS, SEEDS)
    def run(operations: list[str], network: int) -> None:
        last.update(operations=operations, network=network)
        outcome = check(operations, network)
        counts["graphs"] += 1
        counts[outcome] += 1

    try:
        run()
    except Exception as error:  # Whatever went wrong is the finding.
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error) or "no message").splitlines()[0]
        failure = {"portion": number, **last, "error": f"{type(error).__name__}: {said}", "line": where.lineno}
        return {"counts": counts, "failures": [failure]}
    return {"counts": counts, "failures": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the portion that ends after this long")
    parser.add_argument("--operations", help="with --network: check one network, as JSON")
    parser.add_argument("--network", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.network is not None:
        print(check(json.loads(options.operations), options.network))
        return
    start = time.time()
    state: dict = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if state.get("seed") != options.seed:
        state = {"seed": options.seed, "portions": 0, "seconds": 0.0, "failures": [], "counts": {}}
    before = state["seconds"]
    while state["counts"].get("graphs", 0) < options.graphs and time.time() - start < 60 * options.minutes:
        done = portion(state["portions"], options.seed, PORTION)
        counts = {key: state["counts"].get(key, 0) + value for key, value in done["counts"].items()}
        failures = [*state["failures"], *done["failures"]]
        about = provenance(round(before + time.time() - start, 1))
        refused = counts["refused"] / max(1, counts["grown"] + counts["refused"])
        summary = (
            f"{counts['graphs']} random networks, {len(failures)} failures; growing was refused with a clear error on "
            f"{refused:.2%} of those where it was tried."
        )
        state = {
            "what": "trace, grow, take back, shrink, JSON, replay and fold of random networks, proved in float64",
            "summary": summary,
            "seed": options.seed,
            "portions": state["portions"] + 1,
            "counts": counts,
            "failures": failures,
            **about,
        }
        write_json(RESULT, state)
        print(f"{counts['graphs']:6d}  {len(failures)} failures  {about['seconds']:.0f} s", flush=True)
    print(state.get("summary", ""))


if __name__ == "__main__":
    main()
