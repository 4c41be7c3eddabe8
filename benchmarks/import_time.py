"""What `import convette` costs, against `import torch`: fresh interpreters, in turn.

Wall-clock and processor seconds: on a busy machine only the latter mean much.

python benchmarks/import_time.py [--rounds 15]
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from convette._files import write_json
from convette._provenance import provenance

RESULT = Path(__file__).parent / "results" / "import_time.json"
STATEMENTS = {
    "nothing": "pass",
    "import torch": "import torch",
    "import convette": "import convette",
    "from convette import fit": "from convette import fit",
}


def children() -> float:
    """Return the processor seconds of all processes started so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15)
    rounds = options.parse_args().rounds
    begin = time.monotonic()
    seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    processor: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(rounds + 1):
        for statement in random.Random(number).sample(list(STATEMENTS), len(STATEMENTS)):
            start, begun = time.perf_counter(), children()
            subprocess.run([sys.executable, "-c", STATEMENTS[statement]], check=True)
            if number > 0:  # the first round fills the disk cache
                seconds[statement].append(time.perf_counter() - start)
                processor[statement].append(children() - begun)
    wall, cpu = statistics.median(seconds["import torch"]), statistics.median(processor["import torch"])
    result = {
        "what": "seconds of a fresh interpreter with one statement; ratio to `import torch`",
        "target": "import convette <= 1.3 times import torch",
        "rounds": rounds,
        "results": [
            {
                "statement": statement,
                "seconds": round(statistics.median(values), 4),
                "lowest": round(min(values), 4),
                "highest": round(max(values), 4),
                "cpu_seconds": round(statistics.median(processor[statement]), 4),
                "ratio_to_torch": round(statistics.median(values) / wall, 4),
                "cpu_ratio_to_torch": round(statistics.median(processor[statement]) / cpu, 4),
            }
            for statement, values in seconds.items()
        ],
        **provenance(time.monotonic() - begin),
    }
    write_json(RESULT, result)
    for row in result["results"]:
        print(
            f"{row['statement']}: {row['seconds']:.3f} s, {row['ratio_to_torch']:.2f} times import torch "
            f"(processor time: {row['cpu_seconds']:.3f} s, {row['cpu_ratio_to_torch']:.2f})"
        )


if __name__ == "__main__":
    main()
