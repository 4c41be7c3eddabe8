"""Fast sparse ConvNets: a wider network with zeros against a dense one of equal MACs, and speed against dense engines.

    python benchmarks/evidence/fast_sparse_convnets.py [--seeds 3]

Writes benchmarks/evidence/results/fast-sparse-convnets.json. Accuracy: MobileNetV2 0.35 dense against 0.75 with 88 % of
the weights of its 1x1 convolutions zero, on the digits, 12 epochs, trained alike: 0.97 M MACs dense, 0.74 M non-zero.
Speed, batch 1, one thread: networks of timm at 224 px with random zeros, on sparse:cpu against eager, ONNX Runtime and
OpenVINO in float32 on the same dense network; and single products at several densities against PyTorch's (MKL) and a
plain compiled loop. Expected from the sheet: sparse-wide 1 to 3 points better; 0.7 to 1.5 times an optimised library at
90 %.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _figures import paired, shown
from torch import nn

from convette import create_model
from convette._files import write_json
from convette._provenance import provenance
from convette.pipeline.compare import compare
from convette.pipeline.recipe import build_recipe
from convette.runtime import measure_latency, prepare
from convette.runtime.fast_sparse_convnets import _kernels, pack_sparse_1x1
from convette.training.methods.fast_sparse_convnets import magnitude_mask

RESULT = Path(__file__).parent / "results" / "fast-sparse-convnets.json"
SPARSITY = 0.88
TRAIN = {"epochs": 12, "precision": "fp32"}
DENSE = ("eager:cpu", "onnxruntime:cpu", "openvino:cpu:fp32", "openvino:cpu")
SHAPES = ((128, 784), (512, 196), (1024, 49))
DENSITIES = (0.3, 0.2, 0.1, 0.05)


def network_speed(name: str, sparsity: float, block: int) -> dict[str, float]:
    """Median milliseconds of a network with random zeros, sparse and dense, interleaved."""
    model = create_model(name, num_classes=1000, seed=0).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                layer.weight.mul_(magnitude_mask(layer.weight, sparsity, block))
    x = torch.randn(1, 3, 224, 224)
    with contextlib.ExitStack() as stack:
        runners = {engine: stack.enter_context(prepare(engine, model, x)) for engine in ("sparse:cpu", *DENSE)}
        return {name: one.p50 for name, one in measure_latency(runners, x, time_limit=3.0).items()}


def product_speed() -> dict[str, dict[str, float]]:
    """Least milliseconds of 40 of a product Cin = Cout, on each kernel, interleaved."""
    found = {}
    run = _kernels()[0]
    low, high = np.float32(-np.inf), np.float32(np.inf)
    for channels, positions in SHAPES:
        x = np.random.default_rng(0).normal(size=(channels, positions)).astype(np.float32)
        tensor, out = torch.from_numpy(x), np.empty((channels, positions), np.float32)
        weight = torch.randn(channels, channels)
        calls: dict[str, Any] = {"dense (MKL)": lambda w=weight, t=tensor: w @ t}
        full = pack_sparse_1x1(weight, block=1)
        calls["dense, by the sparse kernel"] = lambda p=full, x=x, o=out: run(p, x, low, high, o)
        for density in DENSITIES:
            for block in (1, 4):
                packed = pack_sparse_1x1(weight * magnitude_mask(weight, 1 - density, block), block=block)
                key = f"{density:.0%}" + (", blocks of 4" if block > 1 else "")
                calls[key] = lambda p=packed, x=x, o=out: run(p, x, low, high, o)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(40):
            for key, call in calls.items():
                began = time.perf_counter()
                call()
                best[key] = min(best[key], 1e3 * (time.perf_counter() - began))
        found[f"{channels} x {channels} x {positions}"] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    start = time.monotonic()
    products = product_speed()
    networks = {
        f"{name}, {sparsity:.0%} zeros{', blocks of 4' if block > 1 else ''}": network_speed(name, sparsity, block)
        for name, sparsity, block in (
            ("timm:mobilenetv1_100", 0.9, 1),
            ("timm:mobilenetv1_100", 0.9, 4),
            ("torchvision:mobilenet_v2", 0.9, 1),
        )
    }
    sparse = {"name": "fast-sparse-convnets", "options": {"sparsity": SPARSITY}}
    recipes = {
        "MobileNetV2 0.35, dense": build_recipe(
            {"data": {"source": "digits"}, "train": TRAIN, "model": {"name": "mobilenet_v2_035"}}
        ),
        f"MobileNetV2 0.75, {SPARSITY:.0%} zeros": build_recipe(
            {"data": {"source": "digits"}, "train": TRAIN, "model": {"name": "mobilenet_v2_075"}, "method": [sparse]}
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = compare(recipes, seeds, slug="fast-sparse-convnets", runs=Path(folder) / "runs")
    accuracy = {side.name: side.figures["accuracy"].values for side in result.sides}
    dense, wide = accuracy.values()
    rows: dict[str, list[str]] = {arm: [shown(values, 100), "", "", ""] for arm, values in accuracy.items()}
    for title, one in networks.items():
        library = min(one["onnxruntime:cpu"], one["openvino:cpu:fp32"])
        rows[title] = [
            "",
            f"{one['sparse:cpu']:.2f}",
            f"{one['eager:cpu']:.2f} / {one['onnxruntime:cpu']:.2f} / {one['openvino:cpu:fp32']:.2f} / "
            f"{one['openvino:cpu']:.2f}",
            f"{library / one['sparse:cpu']:.2f}x",
        ]
    for title, one in products.items():
        rows[f"product {title}, 10 %"] = [
            "",
            f"{one['10%']:.3f} ({one['10%, blocks of 4']:.3f} in blocks)",
            f"{one['dense (MKL)']:.3f}",
            f"{one['dense (MKL)'] / one['10%']:.2f}x",
        ]
    summary = (
        f"Digits, {seeds} seeds: the wider network with zeros differs from the dense one by {paired(wide, dense)} "
        "points of test accuracy. Milliseconds with batch 1 and one thread; dense engines: eager, ONNX Runtime, "
        "OpenVINO in float32, and in the precision it prefers. The last column: against the faster of the two in "
        "float32 (of products: against MKL)."
    )
    write_json(
        RESULT,
        {
            "summary": summary,
            "columns": ["test accuracy, %", "sparse, ms", "dense, ms", "speed-up"],
            "rows": rows,
            "accuracy": accuracy,
            "networks": networks,
            "products": products,
            "settings": {"train": TRAIN, "sparsity": SPARSITY, "seeds": seeds},
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
