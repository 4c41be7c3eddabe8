"""Low-bit quantisation from 64 images: what grouping and each stage of distillation bring back, on the digits.

    python benchmarks/evidence/low_bit_limited_data.py [--seeds 3]

Writes benchmarks/evidence/results/low-bit-limited-data.json. A ResNet-20 is trained on the digits per seed; 64 of its
training images, without labels, quantise it to 2-bit (and 4-bit) weights with 4-bit activations (first and last layer
8 bits). Arms at the same bits: naive rounding (the range of each layer's weights and inputs is its largest value); one
scale a layer of least squared error; eight groups; eight groups and stage 1; stage 2 alone; both stages. Steps, rates
and images were fixed before any result (150 steps a block, 150 together; the defaults otherwise). Accuracy on the test
split. Expected from the sheet: grouping recovers about half, stage 1 most, both at least as much as stage 2 alone.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from _figures import paired, shown
from torch import Tensor, nn

from convette import create_model, evaluate, load_data, train
from convette._files import write_json
from convette._progress import note, set_quiet
from convette._provenance import provenance
from convette.layers.quantization.edits import calibrate, edits_to_quantize, layer_bits, pack_layers
from convette.quantization import LowBitSettings, low_bit
from convette.surgery import apply, fold_edits
from convette.training import TrainSettings

RESULT = Path(__file__).parent / "results" / "low-bit-limited-data.json"
IMAGES, STEPS, EPOCHS, ACTIVATIONS = 64, 150, 12, 4
NAIVE, BOTH = "naive rounding", "8 groups, both stages"
ARMS = {
    "one scale a layer": {"scale_groups": 1, "block_steps": 0, "joint_steps": 0},
    "8 groups": {"scale_groups": 8, "block_steps": 0, "joint_steps": 0},
    "8 groups, stage 1": {"scale_groups": 8, "block_steps": STEPS, "joint_steps": 0},
    "8 groups, stage 2": {"scale_groups": 8, "block_steps": 0, "joint_steps": STEPS},
    BOTH: {"scale_groups": 8, "block_steps": STEPS, "joint_steps": STEPS},
}
WORK = {2: (NAIVE, *ARMS), 4: (NAIVE, "8 groups", BOTH)}


def naive(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Return `model` rounded as it is: one range a layer, its largest weight; inputs likewise."""
    rounded = copy.deepcopy(model).eval()
    apply(rounded, *fold_edits(rounded, images[:2]))
    widths, inputs = layer_bits(rounded, bits, True), layer_bits(rounded, ACTIVATIONS, True)
    apply(rounded, *edits_to_quantize(rounded, widths, inputs, 1))
    calibrate(rounded, images, "min_max")
    with torch.no_grad():
        for name in widths:
            layer = rounded.get_submodule(name)
            layer.log_scale.copy_((layer.weight.abs().max() / layer.highest).log()[None])  # type: ignore[union-attr]
    return pack_layers(rounded)


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
        train(model, data, TrainSettings(epochs=EPOCHS, seed=seed, precision="bf16", memory_format="channels_last"))
        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        accuracy["float32"].append(evaluate(model, data.test, data.preprocessing).accuracy)
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        images = data.preprocessing(data.train.images(chosen))
        for bits, names in WORK.items():
            for name in names:
                key, began = f"{bits} bits, {name}", time.monotonic()
                if name == NAIVE:
                    network = naive(model, images, bits)
                else:
                    settings = LowBitSettings(bits=bits, activation_bits=ACTIVATIONS, seed=seed, **ARMS[name])  # type: ignore[arg-type]
                    result = low_bit(model, images, settings)
                    network, size["float32"] = result.model, result.float_size
                seconds.setdefault(key, []).append(time.monotonic() - began)
                accuracy.setdefault(key, []).append(evaluate(network, data.test, data.preprocessing).accuracy)
                size[key] = sum(x.numel() * x.element_size() for x in network.state_dict().values())
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
    two = {name: accuracy[f"2 bits, {name}"] for name in WORK[2]}
    four = {name: accuracy[f"4 bits, {name}"] for name in WORK[4]}
    summary = (
        f"ResNet-20 on the digits, {seeds} seeds, mean and 95 % interval; activations in {ACTIVATIONS} bits, {IMAGES} "
        f"images without labels. With 2-bit weights both stages give {paired(two[BOTH], two[NAIVE])} points over naive "
        f"rounding, {paired(two[BOTH], two['8 groups'])} over grouping alone, "
        f"{paired(two[BOTH], two['8 groups, stage 2'])} over stage 2 alone; with 4-bit weights "
        f"{paired(four[BOTH], four[NAIVE])} over naive rounding."
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
