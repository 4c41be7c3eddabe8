"""Latency under background load: three networks, four loads, two engines, three times over.

    python benchmarks/evidence/latency_variability.py [--samples 500] [--repeats 3]

Writes benchmarks/evidence/results/latency-variability.json. Networks of different make: many small depthwise operators
(MobileNetV2 0.35, small stem), few wide ones (VGG-11 at a quarter), residual ones (ResNet-20), all at 32 px: eager and
OpenVINO on one thread, OpenVINO on two. Loads: none, 1, 2 and 4 processes at full duty on two cores. The whole is
repeated; orders are tested within each repeat, and how far a p99 is reproduced is told. Expected from the paper:
variability grows with load, orders can flip; from the sheet: with twice as many processes as cores the median goes up
2.5 to 4 times.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path
from statistics import fmean

import torch

from convette import create_model
from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.runtime import Contention, VariabilityStudy, prepare, study

RESULT = Path(__file__).parent / "results" / "latency-variability.json"
LOADS = (0, 1, 2, 4)
ARMS = (("eager:cpu", 1), ("openvino:cpu:fp32", 1), ("openvino:cpu:fp32", 2))


def networks() -> dict[str, torch.nn.Module]:
    return {
        "MobileNetV2 0.35": create_model("mobilenet_v2_035", stem="small", seed=0).eval(),
        "VGG-11 0.25": create_model("binary_vgg11_025_real", seed=0).eval(),
        "ResNet-20": create_model("resnet20", seed=0).eval(),
    }


def one(engine: str, threads: int, samples: int) -> VariabilityStudy:
    example = torch.randn(1, 3, 32, 32)
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(prepare(engine, model, example, threads=threads))
            for name, model in networks().items()
        }
        return study(runners, example, [Contention(load) for load in LOADS], samples=samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    start = time.monotonic()
    studies: dict[str, list[VariabilityStudy]] = {}
    for repeat in range(options.repeats):
        for engine, threads in ARMS:
            title = f"{engine}, {threads} thread{'s' if threads > 1 else ''}"
            studies.setdefault(title, []).append(one(engine, threads, options.samples))
            note(f"repeat {repeat}: {title}: {time.monotonic() - start:.0f} s")
    rows = {
        f"{title}, {condition}": row(repeats, condition)
        for title, repeats in studies.items()
        for condition in repeats[0].conditions
    }
    seconds = time.monotonic() - start
    write_json(
        RESULT,
        {
            "summary": summary(studies, options, seconds),
            "columns": ["cores the load got", *networks(), "p99 from repeat to repeat", "rank correlation with idle"],
            "rows": rows,
            "studies": {title: [found.to_json() for found in repeats] for title, repeats in studies.items()},
            "cores": os.cpu_count(),
            **provenance(seconds),
        },
    )


def row(repeats: list[VariabilityStudy], condition: str) -> list[str]:
    cells, apart = [], []
    for name in networks():
        found = [again.spread(condition, name) for again in repeats]
        cells.append(" / ".join(f"{fmean(getattr(s, q) for s in found):.2f}" for q in ("p50", "p95", "p99")))
        tails = [s.p99 for s in found]
        apart.append((max(tails) - min(tails)) / fmean(tails))
    achieved = fmean(found.achieved[condition] for found in repeats)
    taus = ", ".join(f"{found.rank_correlation()[condition]:.2f}" for found in repeats)
    return [f"{achieved:.2f}", *cells, f"{100 * max(apart):.0f} % apart", taus]


def summary(studies: dict[str, list[VariabilityStudy]], options: argparse.Namespace, seconds: float) -> str:
    each = [found for repeats in studies.values() for found in repeats]
    everything = [(found, condition, name) for found in each for condition in found.conditions for name in networks()]
    worst = max(s.spread(c, n).p99 / s.spread(s.conditions[0], n).p99 for s, c, n in everything)
    slow = max(s.slowdown(n)[c] for s, c, n in everything)
    flips: dict[str, int] = {}
    for title, repeats in studies.items():
        for r in (reversal for found in repeats for reversal in found.reversals()):
            told = f"{r.faster} and {r.slower} ({title}, {r.first} to {r.second})"
            flips[told] = flips.get(told, 0) + 1
    told = "; ".join(f"{flip} in {count} of {options.repeats}" for flip, count in flips.items())
    return (
        f"{options.samples} single calls each, p50 / p95 / p99 in ms (means of {options.repeats} repeats), networks "
        f"interleaved within each load. Medians grow up to {slow:.2f} times, the 99th percentile up to {worst:.1f} "
        f"times. Orders of medians reversed beyond chance: {told or 'none'}. The load average of the machine before "
        f"each condition is in the file. Price: {seconds / sum(map(len, studies.values())):.0f} s for a study of three "
        "networks under four loads."
    )


if __name__ == "__main__":
    main()
