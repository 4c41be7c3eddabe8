"""What an image takes in few bits, against float32, engine by engine: all in turns in one run, one thread.

    python benchmarks/evidence/low_bit_speed.py

Writes benchmarks/evidence/results/low_bit_speed.json; on a quiet machine. ResNet-20 at 32 px and ResNet-18 at 224 px
with random weights (time does not depend on them), weights in 8 bits and in 4, inputs in 8; batch 1.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import torch

from convette import create_model
from convette._files import write_json
from convette._progress import note, set_quiet
from convette._provenance import provenance
from convette.quantization import LowBitSettings, low_bit
from convette.runtime import export, measure_latency, prepare

RESULT = Path(__file__).parent / "results" / "low_bit_speed.json"
CASES = {"resnet20, 32 px": ("resnet20", 32), "resnet18, 224 px": ("timm:resnet18", 224)}
ENGINES = {"eager:cpu": None, "onnxruntime:cpu": ".onnx", "openvino:cpu": ".xml"}


def measured(name: str, side: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by engine and precision."""
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = create_model(name, seed=0).eval()
    networks = {"float32": model}
    for bits in (8, 4):
        settings = LowBitSettings(bits=bits, block_steps=0, joint_steps=0)
        networks[f"{bits} bits"] = low_bit(model, images, settings).model
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = {}
        for engine, suffix in ENGINES.items():
            for kind, network in networks.items():
                precision = "fp32" if kind == "float32" else "int8"
                source = export(network, images[:1], folder / f"{kind[0]}{suffix}") if suffix else network
                spec = f"{engine}:{precision}" if suffix else engine
                runners[f"{engine}|{kind}"] = stack.enter_context(prepare(spec, source, images[:1]))
        found = measure_latency(runners, images[:1], time_limit=2.0)
    return {
        engine: {key.partition("|")[2]: one.p50 for key, one in found.items() if key.startswith(f"{engine}|")}
        for engine in ENGINES
    }


def main() -> None:
    torch.set_num_threads(1)
    set_quiet(False)
    start, times = time.monotonic(), {}
    for title, case in CASES.items():
        times[title] = measured(*case)
        note(f"{title}: {times[title]}")
    rows = {
        f"{title}, {engine}": [
            f"{one['float32']:.3g}",
            *(f"{one[kind]:.3g} ({one['float32'] / one[kind]:.2f} times as fast)" for kind in ("8 bits", "4 bits")),
        ]
        for title, engines in times.items()
        for engine, one in engines.items()
    }
    write_json(
        RESULT,
        {
            "summary": "Batch 1, one thread, medians, all engines and precisions in turns in one run.",
            "columns": ["float32, ms", "8 bits, ms", "4 bits, ms"],
            "rows": rows,
            "milliseconds": times,
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
