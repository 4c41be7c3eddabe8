"""Blocks and channels of the detector itself: YOLOv3 on digits strewn over canvases, pruned in two rounds.

    python benchmarks/evidence/yolov3_block_channel_detection.py [--seeds 3]

Writes benchmarks/evidence/results/yolov3_block_channel_detection.json; seeds that the file holds are kept. Per seed: a
YOLOv3 an eighth as wide learns to find zeros, ones and twos (6 : 3 : 1, class weights by count), one or two of 16 to 28
px on a canvas of 64, drawn anew for every step from half of scikit-learn's digits: 240 steps of 16 canvases, Adam at
0.002, bf16. Then 40 % of the MACs and 20 % of the parameters may stay, in two rounds of 25 sparse steps and 45 to
recover: with up to a quarter of the blocks a round left out, or with channels alone; and the whole detector trains on
for as many steps. Mean average precision at an overlap of 0.5 on 200 canvases of the other half. Settings were written
before any result but that 240 steps teach the whole detector something (one other seed).
"""

import copy
import json
import time
from typing import Any

import torch
from _figures import RESULTS, against, shown
from _work import all_digits, options
from torch import Tensor, nn
from torch.nn import functional as F

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.cost import Budget, count
from convette.pruning import PruneSettings, prune
from convette.pruning._blocks import drop_blocks
from convette.pruning.yolov3_block_channel import (
    ANCHORS,
    YOLOLoss,
    YOLOv3,
    branch_norms,
    class_weights,
    detections,
    fold_factors,
    mean_average_precision,
    soft_threshold,
)
from convette.pruning.yolov3_block_channel.rounds import smallest_factors

OUT = RESULTS / "yolov3_block_channel_detection.json"
SIZE, BATCH, BASE, SPARSE, RECOVERY, RATE = 64, 16, 240, 25, 45, 2e-3
SHARES = (0.6, 0.3, 0.1)
SCALED = tuple(tuple((w * SIZE / 208, h * SIZE / 208) for w, h in level) for level in ANCHORS)
WEIGHTS = class_weights([round(1000 * share) for share in SHARES])
LOSS = YOLOLoss(SIZE, 3, SCALED, class_weights=WEIGHTS)
BUDGETS = ("macs<=63%, params<=45%", "macs<=40%, params<=20%")  # half of the way, in factors, then the whole
BLOCK, SCALE = 1.0, 0.5
ARMS = ("whole, trained on", "channels", "blocks and channels")
EXAMPLE = torch.zeros(1, 1, SIZE, SIZE)


def main() -> None:
    choices = options(__doc__)
    kept: dict[str, Any] = json.loads(OUT.read_text()).get("runs", {}) if OUT.exists() else {}
    for seed in range(choices.seeds):
        if str(seed) not in kept:
            began = time.perf_counter()
            kept[str(seed)] = {**one_seed(seed), "seconds": round(time.perf_counter() - began, 1)}
            found = report(list(kept.values()))
            write_json(OUT, {**found, "runs": kept, **provenance(sum(run["seconds"] for run in kept.values()))})


def one_seed(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    half = all_digits()
    train, test = ((images[half[1] < 3], labels[half[1] < 3]) for images, labels in [half] * 2)
    order = torch.randperm(len(train[1]), generator=draw)
    train, test = ((train[0][part], train[1][part]) for part in order.chunk(2))
    canvases = [strewn(*test, BATCH, torch.Generator().manual_seed(1000 + seed + k)) for k in range(13)]
    whole = YOLOv3(3, 0.125, 1).to(memory_format=torch.channels_last)
    fit(whole, train, BASE, draw)
    start = count(whole.eval(), EXAMPLE)
    found: dict[str, Any] = {"start": precision(whole, canvases)}
    note(f"seed {seed}: whole {found['start']:.3f}")
    for arm in ARMS:
        own = torch.Generator().manual_seed(seed + 7)  # every arm sees the same canvases
        model, gone = copy.deepcopy(whole), []
        for budget in BUDGETS:
            if arm == "whole, trained on":
                fit(model, train, SPARSE + RECOVERY, own)
                continue
            factors = fit(model, train, SPARSE, own, sparse=True)
            blocks = smallest_factors(factors, 0.25 if arm == "blocks and channels" else 0.0, float("inf"))
            drop_blocks(model, blocks)
            gone += blocks
            limits = Budget.parse(budget).resolve(start)
            chosen = PruneSettings(criterion="bn_scale", steps=1, epochs=0, seed=seed)
            model = prune(model.eval(), EXAMPLE, limits, chosen, device="cpu").model
            fit(model, train, RECOVERY, own)
        cost = count(model.eval(), EXAMPLE)
        found[arm] = {
            "precision": precision(model, canvases),
            "macs": cost.macs / start.macs,
            "parameters": cost.parameters / start.parameters,
            "blocks": list(gone),
        }
        note(f"seed {seed}, {arm}: {found[arm]}")
    return found


def fit(model: nn.Module, digits: tuple, steps: int, draw: torch.Generator, sparse: bool = False) -> dict[str, float]:
    """Train in place; with `sparse`, with factors on the branches and soft thresholds, folded in the end."""
    norms = branch_norms(model, EXAMPLE) if sparse else {}
    factors = nn.Parameter(torch.ones(len(norms)))
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, output, number=number: output * factors[number])
        for number, name in enumerate(norms.values())
    ]
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = torch.optim.Adam([*model.parameters(), *([factors] if sparse else [])], RATE)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        images, boxes = strewn(*digits, BATCH, draw)
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        LOSS(maps, boxes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if sparse:
            with torch.no_grad():
                rate = optimizer.param_groups[0]["lr"]
                factors.copy_(soft_threshold(factors, rate * BLOCK))
                for scale in scales:
                    scale.copy_(soft_threshold(scale, rate * SCALE))
    for handle in handles:
        handle.remove()
    values = dict(zip(norms, factors.tolist(), strict=True))
    fold_factors(model, {norms[block]: value for block, value in values.items()})
    return values


def strewn(images: Tensor, labels: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Return canvases with one or two digits, side by side if two, and their boxes."""
    canvas, boxes = 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=draw), []

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    for at in range(count):
        rows = []
        for side in range(number(1, 3)):
            kind = int(torch.multinomial(torch.tensor(SHARES), 1, generator=draw))
            ours = (labels == kind).nonzero().flatten()
            size = number(16, 29)
            digit = F.interpolate(images[ours[number(0, len(ours))]][None], (size, size), mode="bilinear")[0]
            x, y = number(0, 32 - size + 1) + 32 * side, number(0, SIZE - size + 1)
            canvas[at, :, y : y + size, x : x + size] += digit
            rows.append([kind, x + size / 2, y + size / 2, size, size])
        boxes.append(torch.tensor(rows, dtype=torch.float32))
    return canvas - 0.2, boxes


@torch.no_grad()
def precision(model: nn.Module, canvases: list) -> float:
    model.eval()
    found, truth = [], []
    for images, boxes in canvases:
        found += detections(model(images), SIZE, 3, anchors=SCALED)
        truth += boxes
    return mean_average_precision(found, truth, 3)


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for arm in ARMS:
        mine = [run[arm] for run in runs]
        shares = [f"{100 * sum(one[key] for one in mine) / len(mine):.0f} %" for key in ("macs", "parameters")]
        gone = ", ".join(str(len(one["blocks"])) for one in mine)
        rows[arm] = [shown([one["precision"] for one in mine], 100), *shares, gone]
    values = {arm: [100 * run[arm]["precision"] for run in runs] for arm in ARMS}
    both = values["blocks and channels"]
    summary = (
        f"{len(runs)} seeds, paired; mean average precision in points. Blocks and channels against the whole detector "
        f"{against(both, values['whole, trained on'])}, against channels alone {against(both, values['channels'])}."
    )
    return {"summary": summary, "columns": ["mAP at 0.5, %", "MACs", "parameters", "blocks of 23 gone"], "rows": rows}


if __name__ == "__main__":
    main()
