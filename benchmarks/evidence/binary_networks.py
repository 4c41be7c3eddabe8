"""Binary networks against their real twins on the digits; and, apart, what the bit-packed engine brings.

    python benchmarks/evidence/binary_networks.py [--seeds 3]
    python benchmarks/evidence/binary_networks.py --speed

The first writes benchmarks/evidence/results/binary-networks.json. A Bi-Real network of four 3x3 convolutions (32 to
256 channels), trained alike (AdamW, 10 epochs of 1,258 images) as: the real twin; binary with ApproxSign; binary with
the plain straight-through estimator; binary without the scale of the filters. And without any training for it: the real
twin's weights rounded to scaled signs. Settings fixed on the validation split of another seed. Expected from the sheet:
binary within 2 to 5 points of real, ApproxSign 0.5 to 3 above the plain estimator.

The second writes benchmarks/evidence/results/binary_networks_speed.json, on a quiet machine: latency of whole networks
(batch 1, one thread, all in one run) on the packed engine against the engines a user would pick for the real twin, of
the largest binary convolution alone, and bytes on disk.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _figures import paired, shown
from torch import nn

from convette import create_model, evaluate, load_data, save, train
from convette._files import write_json
from convette._progress import note, set_quiet
from convette._provenance import provenance
from convette.layers.quantization import BinaryConv2d
from convette.models.binary_networks import BiRealNet
from convette.quantization import pack_binary
from convette.runtime import measure_latency, prepare
from convette.training import TrainSettings, with_own

RESULTS = Path(__file__).parent / "results"
# kind of the network, surrogate, scale of the filters
ARMS = {
    "real": ("real", "approx", "mean"),
    "binary, ApproxSign": ("binary", "approx", "mean"),
    "binary, plain estimator": ("binary", "ste", "mean"),
    "binary, no scale": ("binary", "approx", "one"),
}
ROUNDED = "real, rounded to signs afterwards"
TRAIN = TrainSettings(
    epochs=10, batch_size=64, optimizer="adamw", learning_rate=0.004, label_smoothing=0.0, augmentation=()
)
CASES = {
    "binary_nin, 32 px": ("binary_nin", 32, 10, ""),
    "binary_vgg11, 32 px": ("binary_vgg11", 32, 10, ""),
    "birealnet18, 32 px": ("birealnet18", 32, 10, "small"),
    "birealnet18, 224 px": ("birealnet18", 224, 1000, "default"),
}
ENGINES = ("eager:cpu", "onnxruntime:cpu", "openvino:cpu:fp32", "openvino:cpu")


def network(kind: str, surrogate: str, scale: str, seed: int) -> BiRealNet:
    """Return the small Bi-Real network of an arm."""
    torch.manual_seed(seed)
    model = BiRealNet((1, 1, 1, 1), 10, 1, "small", kind, 0.5, surrogate)
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.scale = scale
    return model


def rounded(real: nn.Module, seed: int) -> nn.Module:
    """Return the binary network with the weights that the real one was trained to."""
    binary = network("binary", "approx", "mean", seed)
    binary.load_state_dict(real.state_dict())
    return binary.eval()


def accuracies(seeds: int) -> None:
    """Train every arm and write what comes out."""
    start, data = time.monotonic(), load_data("digits")
    accuracy: dict[str, list[float]] = {name: [] for name in (*ARMS, ROUNDED)}
    for seed in range(seeds):
        for name, arm in ARMS.items():
            model = network(*arm, seed)
            settings = TrainSettings(**{**TRAIN.__dict__, "seed": seed, "precision": "fp32"})
            train(model, data, settings, methods=with_own(model, [], data))
            accuracy[name].append(evaluate(model, data.test, data.preprocessing).accuracy)
            if name == "real":
                accuracy[ROUNDED].append(evaluate(rounded(model, seed), data.test, data.preprocessing).accuracy)
            note(f"seed {seed}, {name}: {accuracy[name][-1]:.3f}, {time.monotonic() - start:.0f} s")
    weights = {
        name: sum(m.weight.numel() for m in network(*arm, 0).modules() if isinstance(m, BinaryConv2d))
        for name, arm in (*ARMS.items(), (ROUNDED, ("binary", "approx", "mean")))
    }
    total = sum(parameter.numel() for parameter in network("real", "approx", "mean", 0).parameters())
    base, method = accuracy["real"], accuracy["binary, ApproxSign"]
    rows = {
        name: [
            shown(values, 100),
            paired(values, base) if name != "real" else "",
            f"{(weights[name] / 8 + 4 * (total - weights[name])) / 1000:.1f}",
        ]
        for name, values in accuracy.items()
    }
    summary = (
        f"A Bi-Real network of four binary convolutions on the digits, {seeds} seeds, mean and 95 % interval: binary "
        f"with ApproxSign {paired(method, base)} points against its real twin, "
        f"{paired(method, accuracy['binary, plain estimator'])} against the plain estimator, "
        f"{paired(method, accuracy['binary, no scale'])} against signs without a scale, "
        f"{paired(method, accuracy[ROUNDED])} against the real twin rounded to signs without training."
    )
    write_json(
        RESULTS / "binary-networks.json",
        {
            "summary": summary,
            "columns": ["test accuracy, %", "points against real", "KB of weights"],
            "rows": rows,
            "accuracy": accuracy,
            "settings": {"train": {"epochs": TRAIN.epochs, "batch_size": TRAIN.batch_size}, "seeds": seeds},
            **provenance(time.monotonic() - start),
        },
    )


def milliseconds(binary: nn.Module, real: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Median milliseconds on the packed engine and of the real twin on each engine, interleaved in one run."""
    with contextlib.ExitStack() as stack:
        runners = {"packed": stack.enter_context(prepare("binary:cpu", binary, x))}
        for engine in ENGINES:
            runners[f"real, {engine}"] = stack.enter_context(prepare(engine, real, x))
        found = measure_latency(runners, x, time_limit=3.0)
    return {key: one.p50 for key, one in found.items()}


def sizes(name: str) -> dict[str, int]:
    """Bytes on disk with latent weights and packed."""
    model = create_model(name, num_classes=1000 if name == "birealnet18" else 10, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        latent = path.stat().st_size
        save(pack_binary(model), path)
        return {"latent": latent, "packed": path.stat().st_size}


def speed() -> None:
    """Measure the packed engine and write what comes out."""
    start, times, bytes_ = time.monotonic(), {}, {}
    for title, (name, side, classes, stem) in CASES.items():
        given: dict[str, Any] = {"num_classes": classes, "seed": 0} | ({"stem": stem} if stem else {})
        binary, real = create_model(name, **given).eval(), create_model(f"{name}_real", **given).eval()
        times[title] = milliseconds(binary, real, torch.randn(1, 3, side, side))
        bytes_[title] = sizes(name)
        note(f"{title}: {times[title]}")
    for channels, side in ((128, 28), (512, 7)):
        binary, real = (
            nn.Sequential(kind(channels, channels, 3, padding=1)).eval() for kind in (BinaryConv2d, nn.Conv2d)
        )
        title = f"one 3x3 convolution, {channels} channels, {side} px"
        times[title] = milliseconds(binary, real, torch.randn(1, channels, side, side))
        bytes_[title] = {"latent": 36 * channels**2, "packed": 9 * channels**2 // 8 + 4 * channels}
    rows, ratios = {}, []
    for title, one in times.items():
        floats = {key: value for key, value in one.items() if key.startswith("real, ") and key != "real, openvino:cpu"}
        best = min(floats, key=lambda key: floats[key])
        ratios.append(f"{title} {floats[best] / one['packed']:.2f} times")
        rows[title] = [
            f"{one['packed']:.3g}",
            f"{floats[best]:.3g} ({best.removeprefix('real, ')})",
            f"{floats[best] / one['packed']:.2f}",
            f"{one['real, openvino:cpu'] / one['packed']:.2f}",
            f"{bytes_[title]['packed'] / 1e6:.2f} of {bytes_[title]['latent'] / 1e6:.2f}",
        ]
    summary = (
        "Batch 1, one thread, medians, all engines in turns in one run. Speed of the packed engine against the fastest "
        f"engine in float32: {'; '.join(ratios)}. OpenVINO by itself computes in bfloat16 where the processor has it."
    )
    write_json(
        RESULTS / "binary_networks_speed.json",
        {
            "summary": summary,
            "columns": [
                "packed, ms",
                "real twin, float32, ms",
                "times as fast as float32",
                "times as fast as OpenVINO's choice",
                "MB on disk, packed of latent",
            ],
            "rows": rows,
            "milliseconds": times,
            "bytes": bytes_,
            **provenance(time.monotonic() - start),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    set_quiet(False)
    speed() if given.speed else accuracies(given.seeds)


if __name__ == "__main__":
    main()
