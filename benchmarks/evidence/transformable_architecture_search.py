"""TAS against one factor on all widths, at equal MACs: the same training for both.

    python benchmarks/evidence/transformable_architecture_search.py [--seeds 3]

Writes benchmarks/evidence/results/transformable-architecture-search.json. Per seed: a search on 539 digits (two blocks
a stage, widths 8, 16, 32, target half of the MACs), then the shape found and a network of equal depth whose widths are
all multiplied by the one factor that brings it to the same MACs (never fewer) are trained alike, from scratch, without
a teacher. Settings were written before any result.
"""

import argparse
import time
from pathlib import Path

import torch

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import load_data
from convette.pipeline.compare import estimate
from convette.pruning.transformable_architecture_search import (
    SearchResNet,
    Shape,
    ShapedResNet,
    TASSettings,
    search,
    shape_macs,
)
from convette.training import TrainSettings, evaluate, train

OUT = Path(__file__).parent / "results" / "transformable-architecture-search.json"
BLOCKS, WIDTHS, EPOCHS = 2, (8, 16, 32), 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), {"uniform": [], "TAS": []}
    shares: list[float] = []
    data = load_data("digits", test_fraction=0.6)
    size = data.preprocessing.height
    for seed in range(options.seeds):
        settings = TASSettings(
            macs=0.5, blocks=BLOCKS, widths=WIDTHS, epochs=10, batch_size=64, size_rate=0.02, seed=seed
        )
        found = search(data, settings)
        shares.append(found.macs / found.whole_macs)
        for name, shape in (("uniform", uniform(found.macs, size)), ("TAS", found.shape)):
            torch.manual_seed(seed)
            chosen = TrainSettings(epochs=EPOCHS, batch_size=64, augmentation=(), precision="fp32", seed=seed)
            model = train(ShapedResNet(shape), data, chosen, device="cpu").model
            rows[name].append(float(evaluate(model, data.test, data.preprocessing).accuracy))
            note(f"seed {seed}, {name}: {rows[name][-1]:.2%} at {shape_macs(shape, size)} MACs")
    differences = [a - b for a, b in zip(rows["TAS"], rows["uniform"], strict=True)]
    gained = estimate(differences)
    summary = (
        f"TAS found shapes of {100 * sum(shares) / len(shares):.0f} % of the MACs (target 50 %); against uniform "
        f"widths at the same MACs it is {100 * gained.mean:+.2f} points (95 % interval {100 * gained.low:+.2f} to "
        f"{100 * gained.high:+.2f}) over {options.seeds} seeds."
    )
    table = {name: [f"{100 * estimate(values).mean:.2f}"] for name, values in rows.items()}
    raw = {"accuracies": rows, "shares": shares}
    write_json(
        OUT,
        {
            "summary": summary,
            "columns": ["test accuracy, %"],
            "rows": table,
            **raw,
            **provenance(time.perf_counter() - started),
        },
    )
    note(summary)


def uniform(macs: int, size: int) -> Shape:
    """Return the narrowest network of full depth with all widths by one factor that has at least `macs`."""
    whole = SearchResNet(BLOCKS, WIDTHS, in_channels=1).whole()
    for step in range(1, 101):
        channels = (whole.channels[0], *(max(1, round(step / 100 * width)) for width in whole.channels[1:]))
        shape = Shape(channels, whole.kept, whole.blocks)
        if shape_macs(shape, size) >= macs:
            return shape
    return whole


if __name__ == "__main__":
    main()
