"""Binary networks against their real twins on the digits, two surrogates; and what the bit-packed engine brings.

    python benchmarks/evidence/binary_networks.py [--seeds 3]

Writes benchmarks/evidence/results/binary-networks.json. Bi-Real-18 at a quarter of its width, trained alike (AdamW, 12
epochs): real, binary with ApproxSign, binary with the plain straight-through estimator. Settings fixed beforehand.
Expected from the sheet: binary within 2 to 5 points of real, ApproxSign 0.5 to 3 above the plain one. Price: latency
of whole networks (batch 1, one thread, all in one run) on the packed engine against the engines a user would pick for
the real twin, and bytes on disk.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _figures import paired, shown

from convette import create_model, save
from convette._files import write_json
from convette._provenance import provenance
from convette.pipeline.compare import compare
from convette.pipeline.recipe import build_recipe
from convette.quantization import pack_binary
from convette.runtime import measure_latency, prepare

RESULT = Path(__file__).parent / "results" / "binary-networks.json"
ARMS = {
    "real": "birealnet18_025_real",
    "binary, ApproxSign": "birealnet18_025",
    "binary, plain estimator": "birealnet18_025_ste",
}
TRAIN = {"epochs": 12, "optimizer": "adamw", "learning_rate": 0.004, "label_smoothing": 0.0, "precision": "fp32"}
ENGINES = ("eager:cpu", "onnxruntime:cpu", "openvino:cpu:fp32", "openvino:cpu")


def speed(name: str, side: int, classes: int, stem: str) -> dict[str, float]:
    """Median milliseconds an image, of the packed engine and of the real twin on each engine, interleaved."""
    models: dict[str, Any] = {}
    for kind, suffix in (("binary", ""), ("real", "_real")):
        given = {"stem": stem} if name.startswith("bireal") else {}
        models[kind] = create_model(f"{name}{suffix}", num_classes=classes, seed=0, **given).eval()  # type: ignore[arg-type]
    x = torch.randn(1, 3, side, side)
    with contextlib.ExitStack() as stack:
        runners = {"packed": stack.enter_context(prepare("binary:cpu", models["binary"], x))}
        for engine in ENGINES:
            runners[f"real, {engine}"] = stack.enter_context(prepare(engine, models["real"], x))
        found = measure_latency(runners, x, time_limit=3.0)
    return {key: one.p50 for key, one in found.items()} | {
        "real bf16?": float(found["real, openvino:cpu"].precision == "bf16")
    }


def sizes(name: str) -> dict[str, int]:
    model = create_model(name, num_classes=1000 if name == "birealnet18" else 10, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        latent = path.stat().st_size
        save(pack_binary(model), path)
        return {"latent": latent, "packed": path.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    start = time.monotonic()
    tables = {"data": {"source": "digits"}, "train": TRAIN}
    recipes = {arm: build_recipe({**tables, "model": {"name": name}}) for arm, name in ARMS.items()}
    with tempfile.TemporaryDirectory() as folder:
        result = compare(recipes, seeds, slug="binary-networks", runs=Path(folder) / "runs")
    accuracy = {side.name: side.figures["accuracy"].values for side in result.sides}
    cases = {
        "binary_nin, 32 px": ("binary_nin", 32, 10, ""),
        "binary_vgg11, 32 px": ("binary_vgg11", 32, 10, ""),
        "birealnet18, 32 px": ("birealnet18", 32, 10, "small"),
        "birealnet18, 224 px": ("birealnet18", 224, 1000, "default"),
    }
    times = {title: speed(*case) for title, case in cases.items()}
    bytes_ = {name: sizes(name) for name in ("binary_nin", "binary_vgg11", "birealnet18")}
    rows = {
        arm: [shown(values, 100), paired(values, accuracy["real"]) if arm != "real" else "", "", "", ""]
        for arm, values in accuracy.items()
    }
    for title, one in times.items():
        size = bytes_[title.partition(",")[0]]
        real = min(value for key, value in one.items() if key.startswith("real, ") and key != "real, openvino:cpu")
        rows[title] = [
            "",
            "",
            f"{one['packed']:.2f}",
            f"{real:.2f} (fp32), {one['real, openvino:cpu']:.2f} (OpenVINO's choice)",
            f"{size['packed'] / 1e6:.2f} of {size['latent'] / 1e6:.2f}",
        ]
    summary = (
        f"Bi-Real-18 at a quarter of its width on the digits, {seeds} seeds: binary with ApproxSign "
        f"{paired(accuracy['binary, ApproxSign'], accuracy['real'])} points against its real twin, against the plain "
        f"estimator {paired(accuracy['binary, ApproxSign'], accuracy['binary, plain estimator'])}. Below, what an "
        "image takes on the packed engine and, as the real twin, on the fastest engine in float32 and on OpenVINO in "
        "the precision it prefers (bfloat16 where the processor has it)."
    )
    write_json(
        RESULT,
        {
            "summary": summary,
            "columns": ["test accuracy, %", "points against real", "packed, ms", "real twin, ms", "MB on disk"],
            "rows": rows,
            "accuracy": accuracy,
            "milliseconds": times,
            "bytes": bytes_,
            "settings": {"train": TRAIN, "arms": ARMS, "seeds": seeds},
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
