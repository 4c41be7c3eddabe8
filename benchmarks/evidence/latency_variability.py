"""Latency under background load: three networks, four loads, two engines.

    python benchmarks/evidence/latency_variability.py [--samples 500]

Writes benchmarks/evidence/results/latency-variability.json. Networks of different make: many small depthwise operators
(MobileNetV2 0.35, small stem), few wide ones (VGG-11 at a quarter), residual ones (ResNet-20), all at 32 px, one
thread. Loads: none, 1, 2 and 4 processes at full duty on two cores. Expected from the paper: variability grows with
load, orders can flip; from the sheet: with twice as many processes as cores the median goes up 2.5 to 4 times.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

import torch

from convette import create_model
from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.runtime import Contention, VariabilityStudy, prepare, study

RESULT = Path(__file__).parent / "results" / "latency-variability.json"
LOADS = (0, 1, 2, 4)


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
    samples = parser.parse_args().samples
    start = time.monotonic()
    studies = {}
    for engine in ("eager:cpu", "openvino:cpu:fp32"):
        for threads in (1,):
            studies[engine, threads] = one(engine, threads, samples)
            note(f"{engine}, {threads} threads: {time.monotonic() - start:.0f} s")
    rows, flips = {}, []
    for (engine, threads), found in studies.items():
        title = f"{engine}, {threads} thread{'s' if threads > 1 else ''}"
        flips += [f"{r.faster} and {r.slower} ({title}, {r.first} to {r.second})" for r in found.reversals()]
        for condition in found.conditions:
            cells = []
            for name in networks():
                s = found.spread(condition, name)
                cells.append(f"{s.p50:.2f} / {s.p95:.2f} / {s.p99:.2f}")
            tau = found.rank_correlation()[condition]
            rows[f"{title}, {condition}"] = [f"{found.achieved[condition]:.2f}", *cells, f"{tau:.2f}"]
    worst = max(
        found.spread(c, n).p99 / found.spread(found.conditions[0], n).p99
        for found in studies.values()
        for c in found.conditions
        for n in networks()
    )
    slow = max(max(found.slowdown(n).values()) for found in studies.values() for n in networks())
    summary = (
        f"{samples} single calls each, p50 / p95 / p99 in ms, networks interleaved within each load. Medians grow up "
        f"to {slow:.2f} times, the 99th percentile up to {worst:.1f} times. Orders of medians reversed beyond chance: "
        f"{'; '.join(flips) or 'none'}. The machine was shared: its load average before each condition is in the file."
    )
    write_json(
        RESULT,
        {
            "summary": summary,
            "columns": ["cores the load got", *networks(), "rank correlation with idle"],
            "rows": rows,
            "studies": {
                f"{engine}, {threads} threads": found.to_json() for (engine, threads), found in studies.items()
            },
            "cores": os.cpu_count(),
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
