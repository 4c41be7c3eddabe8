"""Main/subsidiary against removing binary filters at random, as many of each layer, the same retraining.

    python benchmarks/evidence/main_subsidiary.py [--seeds 3]

Writes benchmarks/evidence/results/main-subsidiary.json. Per seed: a binary network of three binary convolutions is
trained on 539 digits; gates are learned layer by layer (no retraining between, so that only the choice differs), then
as many filters of each layer are drawn at random. Both get their batch-norm statistics anew; accuracies before and
after four epochs of training alike. Settings were written before any result.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from _work import share_right
from torch import nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import load_data
from convette.layers.quantization import BinaryConv2d
from convette.pipeline.compare import estimate
from convette.pruning import recalibrate
from convette.pruning.main_subsidiary import SubsidiarySettings, main_subsidiary
from convette.surgery import apply, trace
from convette.training import TrainSettings, train

OUT = Path(__file__).parent / "results" / "main-subsidiary.json"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)]
    for a, b, stride in ((16, 32, 1), (32, 48, 2), (48, 48, 1)):
        layers += [BinaryConv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = load_data("digits", test_fraction=0.6)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    before: dict[str, list[float]] = {"random": [], "learned": []}
    after: dict[str, list[float]] = {"whole": [], "random": [], "learned": []}
    kept_share: list[float] = []
    for seed in range(options.seeds):
        chosen = TrainSettings(epochs=15, batch_size=64, augmentation=(), precision="fp32", seed=seed)
        again = TrainSettings(epochs=4, batch_size=64, augmentation=(), precision="fp32", learning_rate=0.02, seed=seed)
        whole = train(network(seed), data, chosen, device="cpu").model
        after["whole"].append(share_right(whole, data))
        settings = SubsidiarySettings(
            strength=0.5, mask_epochs=10, mask_rate=2e-3, retrain_epochs=0, final_epochs=0, least=4, seed=seed
        )
        learned = main_subsidiary(whole, data, settings)
        filters = learned.filters
        kept_share.append(filters[1] / filters[0])
        drawn = copy.deepcopy(whole)
        draw, graph = torch.Generator().manual_seed(seed), trace(drawn, example)
        selection = {
            name: torch.randperm(size, generator=draw)[:kept].sort().values
            for name, (size, kept) in learned.kept.items()
            if kept < size
        }
        if selection:
            apply(drawn, graph.shrink(selection))
        recalibrate(drawn, data, seed=seed)
        for name, model in (("random", drawn), ("learned", learned.model)):
            before[name].append(share_right(model, data))
            after[name].append(share_right(train(model, data, again, device="cpu").model, data))
        figures = f"learned {before['learned'][-1]:.2%}, {after['learned'][-1]:.2%}"
        note(f"seed {seed}: {filters[1]} of {filters[0]} filters; {figures}")
    gained = [estimate([a - b for a, b in zip(x["learned"], x["random"], strict=True)]) for x in (before, after)]
    intervals = [
        f"{100 * g.mean:+.2f} points (95 % interval {100 * g.low:+.2f} to {100 * g.high:+.2f})" for g in gained
    ]
    summary = (
        f"{100 * sum(kept_share) / len(kept_share):.0f} % of the binary filters stay; against as many at random, "
        f"learned gates are {intervals[0]} before retraining and {intervals[1]} after it; {options.seeds} seeds."
    )
    table = {
        name: [
            f"{100 * estimate(before[name]).mean:.2f}" if name in before else "",
            f"{100 * estimate(after[name]).mean:.2f}",
        ]
        for name in after
    }
    raw = {"before": before, "after": after, "kept": kept_share}
    columns = ["cut, %", "retrained, %"]
    write_json(
        OUT, {"summary": summary, "columns": columns, "rows": table, **raw, **provenance(time.perf_counter() - started)}
    )
    note(summary)


if __name__ == "__main__":
    main()
