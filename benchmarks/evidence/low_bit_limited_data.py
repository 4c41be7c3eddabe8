"""Low-bit quantisation from 64 images: what grouping and each stage of distillation bring back, on the digits.

    python benchmarks/evidence/low_bit_limited_data.py [--seeds 3]

Writes benchmarks/evidence/results/low-bit-limited-data.json. A ResNet-20 is trained on the digits per seed; 64 of its
training images, without labels, quantise it to 2-bit weights with 4-bit activations (first and last layer 8 bits).
Arms: one scale a layer; eight groups; eight groups and stage 1; stage 2 alone; both stages. Steps, rates and images
were fixed before any result (200 steps a block, 200 together; the room's defaults otherwise). Accuracy on the test
split. Expected from the sheet: grouping recovers about half, stage 1 most, both at least as much as stage 2 alone.
"""

import argparse
import time
from pathlib import Path

import torch
from _figures import paired, shown

from convette import create_model, evaluate, load_data, train
from convette._files import write_json
from convette._progress import note, set_quiet
from convette._provenance import provenance
from convette.quantization import LowBitSettings, low_bit
from convette.training import TrainSettings

RESULT = Path(__file__).parent / "results" / "low-bit-limited-data.json"
IMAGES, STEPS, EPOCHS, BITS = 64, 200, 12, (2,)
ARMS = {
    "one scale a layer": {"scale_groups": 1, "block_steps": 0, "joint_steps": 0},
    "8 groups": {"scale_groups": 8, "block_steps": 0, "joint_steps": 0},
    "8 groups, stage 1": {"scale_groups": 8, "block_steps": STEPS, "joint_steps": 0},
    "8 groups, stage 2": {"scale_groups": 8, "block_steps": 0, "joint_steps": STEPS},
    "8 groups, both stages": {"scale_groups": 8, "block_steps": STEPS, "joint_steps": STEPS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    set_quiet(False)
    start = time.monotonic()
    data = load_data("digits")
    accuracy: dict[str, list[float]] = {"float32": []}
    size: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(seeds):
        model = create_model("resnet20", in_channels=1, seed=seed)
        train(model, data, TrainSettings(epochs=EPOCHS, seed=seed))
        accuracy["float32"].append(evaluate(model, data.test, data.preprocessing).accuracy)
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        images = data.preprocessing(data.train.images(chosen))
        for bits in BITS:
            for name, arm in ARMS.items():
                key = f"{bits} bits, {name}"
                began = time.monotonic()
                result = low_bit(model, images, LowBitSettings(bits=bits, activation_bits=4, seed=seed, **arm))  # type: ignore[arg-type]
                seconds.setdefault(key, []).append(time.monotonic() - began)
                accuracy.setdefault(key, []).append(evaluate(result.model, data.test, data.preprocessing).accuracy)
                size[key], size["float32"] = result.size, result.float_size
                note(f"seed {seed}, {key}: {accuracy[key][-1]:.3f}, {time.monotonic() - start:.0f} s")
    base = accuracy["float32"]
    rows = {
        name: [
            shown(values, 100),
            paired(values, base) if name != "float32" else "",
            f"{size[name] / 1000:.1f}",
            f"{sum(seconds[name]) / len(seconds[name]):.1f}" if name in seconds else "",
        ]
        for name, values in accuracy.items()
    }
    both, plain = (accuracy[f"2 bits, 8 groups{arm}"] for arm in (", both stages", ""))
    summary = (
        f"ResNet-20 on the digits, {seeds} seeds, mean and 95 % interval; weights in 2 bits, activations in 4, "
        f"{IMAGES} images without labels. With 2 bits both stages change the test accuracy by {paired(both, plain)} "
        "points over grouping alone."
    )
    write_json(
        RESULT,
        {
            "summary": summary,
            "columns": ["test accuracy, %", "points against float32", "KB of weights", "seconds of quantising"],
            "rows": rows,
            "accuracy": accuracy,
            "settings": {"images": IMAGES, "steps": STEPS, "epochs": EPOCHS, "seeds": seeds},
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    main()
