"""Block and channel pruning against channels alone, at the same MACs and with the same sparse training and recovery.

    python benchmarks/evidence/yolov3_block_channel.py [--seeds 3]

Writes benchmarks/evidence/results/yolov3-block-channel.json; seeds that the file holds are kept. Per seed: a classifier
on the backbone of YOLOv3, an eighth as wide (23 residual blocks), is trained on 539 digits of 32 px and pruned to a
quarter of its MACs in two rounds of 2 epochs of sparse training and 3 of recovery, the unpruned network teaching: with
up to a quarter of the blocks a round left out and channels by batch-norm scale; with channels alone (block_share 0);
with channels alone by L1 magnitude, without sparse training, for 10 epochs in two steps. Latency is that of one image
on one thread, medians of 30 runs. Settings were written before any result.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _figures import gained, shown
from _work import go_on, options, share_right
from torch import Tensor, nn

from convette._progress import note
from convette.cost import count
from convette.data import ImageData, load_data
from convette.pruning import PruneSettings, prune
from convette.pruning.yolov3_block_channel import BlockChannelSettings, YOLOv3, block_then_channel
from convette.training import TrainSettings, train

OUT = Path(__file__).parent / "results" / "yolov3-block-channel.json"
BUDGET = "macs<=25%"
TRAIN = {
    "batch_size": 64,
    "augmentation": (),
    "precision": "bf16",
    "memory_format": "channels_last",
    "ema_decay": None,
}
ARMS = ("channels by magnitude", "channels by scale", "blocks and channels")


class Backbone(nn.Module):
    """Darknet-53 as YOLOv3 has it, with a classifier on the mean of its last map."""

    def __init__(self, width: float = 0.125) -> None:
        super().__init__()
        detector = YOLOv3(num_classes=1, width=width, in_channels=1)
        self.stem, self.stages = detector.stem, detector.stages
        self.linear = nn.Linear(round(1024 * width), 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def main() -> None:
    seeds, data = range(options(__doc__).seeds), load_data("digits", image_size=32, test_fraction=0.6)
    work = {str(seed): lambda seed=seed: one_seed(data, seed) for seed in seeds}
    go_on(OUT, work, lambda kept: report(list(kept.values())) if len(kept) > 1 else {})


def one_seed(data: ImageData, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    settings = TrainSettings(epochs=15, seed=seed, **TRAIN)
    whole = train(Backbone(), data, settings, device="cpu").model.eval()
    again = TrainSettings(learning_rate=0.05, seed=seed, **TRAIN)
    models: dict[str, nn.Module] = {"whole": whole}
    choices = PruneSettings(criterion="l1", steps=2, epochs=10, seed=seed)
    models["channels by magnitude"] = prune(whole, data, BUDGET, choices, train_settings=again, device="cpu").model
    gone: tuple[str, ...] = ()
    for name, share in (("channels by scale", 0.0), ("blocks and channels", 0.25)):
        rounds = BlockChannelSettings(rounds=2, sparse_epochs=2, epochs=3, block_share=share, tied="mean", seed=seed)
        result = block_then_channel(whole, data, BUDGET, rounds, train_settings=again)
        models[name], gone = result.model, tuple(block for blocks in result.blocks for block in blocks)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    found: dict[str, Any] = {"blocks": gone}
    milliseconds = latencies(models, example)
    for name, model in models.items():
        cost = count(model, example)
        found[name] = {
            "accuracy": share_right(model, data),
            "macs": cost.macs,
            "parameters": cost.parameters,
            "ms": milliseconds[name],
        }
        note(f"seed {seed}, {name}: {found[name]}")
    return found


@torch.no_grad()
def latencies(models: dict[str, nn.Module], example: Tensor) -> dict[str, float]:
    seen: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(35):
        for name, model in models.items():
            began = time.perf_counter()
            model.eval()(example)
            if turn >= 5:
                seen[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in seen.items()}


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for arm in ("whole", *ARMS):
        macs, parameters = (
            f"{100 * statistics.mean(run[arm][key] / run['whole'][key] for run in runs):.0f} %"
            for key in ("macs", "parameters")
        )
        ms = f"{statistics.mean(run[arm]['ms'] for run in runs):.1f}"
        rows[arm] = [shown([run[arm]["accuracy"] for run in runs], 100), macs, parameters, ms]

    def against(other: str) -> str:
        return gained(*([run[arm]["accuracy"] for run in runs] for arm in ("blocks and channels", other)))

    blocks = ", ".join(str(len(run["blocks"])) for run in runs)
    faster = statistics.mean(run["channels by scale"]["ms"] / run["blocks and channels"]["ms"] for run in runs)
    summary = (
        f"{len(runs)} seeds, a quarter of the MACs; {blocks} of 23 blocks went. Blocks and channels are "
        f"{against('channels by scale')} against channels alone with the same sparse training and "
        f"{against('channels by magnitude')} against channels by magnitude; one image takes {faster:.2f} times less "
        "time than with channels alone."
    )
    columns = ["test accuracy, %", "MACs", "parameters", "ms an image, eager, on a busy machine"]
    return {"summary": summary, "columns": columns, "rows": rows}


if __name__ == "__main__":
    main()
