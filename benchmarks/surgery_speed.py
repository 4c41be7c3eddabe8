"""Seconds from a network to the same network with half of its channels, beside Torch-Pruning 1.6.1.

    pip install torch-pruning==1.6.1
    python benchmarks/surgery_speed.py [--only timm:resnet18] [--repeats 3]

Both run in one process, one thread, turn by turn, on copies of one model, and remove half of the channels of every
layer but the last, chosen at random; garbage is collected before each turn, so that nobody pays for the other's.
Ours: trace, choose, edit, apply. Torch-Pruning: `BasePruner` with `RandomImportance`, local ratio 0.5, output layers
ignored; the graph it builds is part of it, and listed apart as *graph*.

*again*: a second, other selection from what is already known, again half of every group. For us the same
`ChannelGraph` on a fresh copy (made beforehand, as the copies that Torch-Pruning works on are). Torch-Pruning's graph
belongs to the model it changed, so for another selection it starts over (`ratio_again`: its whole run, graph included,
by ours without a trace); what it can do with the graph it has is a further step on the model that has shrunk already
(*step*, `ratio_step`): less work than the first. Where a network holds sizes in Python, the first selection has run it
for them; one that leaves as many channels does not do so again. *other widths* is a third selection, of two fifths,
whose sizes have not been run (`ratio_other_widths`, by Torch-Pruning's whole run). Nothing is proved on either side.

Each side is run once before it is timed. The median of the repeats is reported. Models Torch-Pruning cannot do, or not
within `--limit` seconds, are listed without a ratio. Writes benchmarks/results/surgery_speed.json.
"""

import argparse
import copy
import gc
import math
import statistics
import time
import tracemalloc
import warnings
from pathlib import Path

import torch
from torch import nn

from convette._files import write_json
from convette._provenance import provenance
from convette.layers._watching import call
from convette.surgery import apply, trace
from surgery_coverage import build, randomise

RESULT = Path(__file__).parent / "results" / "surgery_speed.json"
MODELS = {
    "torchvision:resnet18": 224,
    "torchvision:resnet50": 224,
    "torchvision:resnext50_32x4d": 224,
    "torchvision:vgg11_bn": 224,
    "torchvision:mobilenet_v2": 224,
    "torchvision:mobilenet_v3_large": 224,
    "torchvision:efficientnet_b0": 224,
    "torchvision:densenet121": 224,
    "torchvision:inception_v3": 299,
    "torchvision:googlenet": 224,
    "torchvision:regnet_x_400mf": 224,
    "torchvision:regnet_y_400mf": 224,
    "torchvision:convnext_tiny": 224,
    "torchvision:mnasnet1_0": 224,
    "torchvision:squeezenet1_1": 224,
    "torchvision:fcn_resnet50": 128,
    "torchvision:deeplabv3_mobilenet_v3_large": 128,
    "timm:ghostnet_100": 224,
    "timm:mobileone_s0": 224,
    "timm:repvgg_a0": 224,
    "timm:dla34": 224,
    "timm:hrnet_w18_small": 224,
    "timm:xception41": 224,
    "timm:regnetz_b16": 224,
    "timm:mobilenetv4_conv_small": 224,
    "timm:starnet_s1": 224,
    "timm:vit_tiny_patch16_224": 224,
    # Detectors rank their boxes, so their trace takes values; their own transforms set the size they work at.
    "torchvision:ssd300_vgg16": 300,
    "torchvision:ssdlite320_mobilenet_v3_large": 320,
    "torchvision:retinanet_resnet50_fpn": 320,
}
DETECTORS = ("ssd", "retinanet")
RATIOS = ("ratio", "ratio_again", "ratio_other_widths", "ratio_step")
# What a detector computes for each place: its last layers.
FINAL = ("cls_logits", "bbox_reg", "classification_head.module_list", "regression_head.module_list")


def prepared(name: str, size: int) -> tuple[nn.Module, object]:
    """Return a model in eval mode, untrained, and an example at the size it is made for."""
    torch.manual_seed(0)
    model = build(name).eval()
    randomise(model)
    if not any(word in name for word in DETECTORS):
        return model, torch.randn(1, 3, size, size)
    if "retinanet" in name:
        model.transform.min_size, model.transform.max_size = (size,), size
    return model, ([torch.rand(3, size, size)],)


def chosen(graph, seed: int, share: float) -> dict[str, torch.Tensor]:
    """Return a random share of the units of every group, and no fewer than it must keep."""
    sizes = torch.tensor([group.size for group in graph])
    many = [max(math.ceil(group.size * share), min(group.constraints.minimum, group.size)) for group in graph]
    if not many:
        return {}
    owner = torch.repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    # One draw for all groups: the first of each after shuffling.
    draw = torch.rand(len(owner), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = (owner + draw).argsort()
    first = torch.arange(len(owner)) - starts[owner] < torch.tensor(many)[owner]
    units = order[first].sort().values
    return dict(zip([group.name for group in graph], (units - starts[owner[units]]).split(many), strict=True))


def ours(model: nn.Module, example, seed: int) -> tuple[float, float, float, float]:
    """Return seconds of trace, of everything, of a second, other selection on another copy, and of a third with other
    widths."""
    copies = copy.deepcopy(model), copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    graph = trace(model, example)
    traced = time.perf_counter()
    apply(model, graph.shrink(chosen(graph, seed, 0.5)))
    times = [traced - start, time.perf_counter() - start]
    for other, share in zip(copies, (0.5, 0.4), strict=True):
        # The graph speaks of the network as it was traced: the copies still are.
        graph.model = other
        gc.collect()
        again = time.perf_counter()
        apply(other, graph.shrink(chosen(graph, seed + 1000, share)))
        times.append(time.perf_counter() - again)
    return times[0], times[1], times[2], times[3]


def theirs(model: nn.Module, example, seed: int) -> tuple[float, float, float]:
    """Return seconds of Torch-Pruning's graph and pruner, of these and a step, and of a further step."""
    import torch_pruning as tp

    torch.manual_seed(seed)
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    ignored = [
        module
        for name, module in model.named_modules()
        if module is last
        or (isinstance(module, nn.Linear) and module.out_features == 1000)
        or (isinstance(module, nn.Conv2d) and module.out_channels in (1000, 21))
        or (isinstance(module, nn.Conv2d) and any(part in name for part in FINAL))
    ]
    heads = {module.qkv: module.num_heads for module in model.modules() if hasattr(module, "qkv")}
    gc.collect()
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.RandomImportance(), pruning_ratio=0.75, iterative_steps=2,
        iterative_pruning_ratio_scheduler=lambda ratio, steps: [0.0, 0.5, ratio], ignored_layers=ignored,
        num_heads=heads,
    )  # fmt: skip
    built = time.perf_counter()
    pruner.step()
    stepped = time.perf_counter()
    gc.collect()
    again = time.perf_counter()
    pruner.step()
    return built - start, stepped - start, time.perf_counter() - again


def memory(model: nn.Module, example) -> float:
    """Return the most memory Python and the label tensors hold during a trace, in multiples of the model's size."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    tracemalloc.start()
    graph = trace(model, example)
    labels = {id(slot.labels): slot.labels.numel() * 8 for slot in graph.slots()}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (peak + sum(labels.values())) / size


def measure(name: str, size: int, repeats: int, limit: float) -> dict:
    """Return a row: medians, ratios, or why there is none."""
    model, example = prepared(name, size)
    with torch.no_grad():
        call(model, example)
        start = time.perf_counter()
        call(model, example)
    row: dict = {"model": name, "forward": time.perf_counter() - start}
    own, other, reason = [], [], None
    for repeat in range(repeats + 1):
        own.append(ours(copy.deepcopy(model), example, repeat))
        if reason is None:
            try:
                other.append(theirs(copy.deepcopy(model), example, repeat))
                if other[-1][1] > limit:
                    reason = f"over {limit:.0f} s"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:160]
    own, other = own[1:], other[1:] or other
    for key, values in zip(("trace", "ours", "again", "other_widths"), zip(*own, strict=True), strict=True):
        row[key] = statistics.median(values)
    row["memory_over_model"] = memory(model, example)
    if other:
        parts = (statistics.median(part) for part in zip(*other, strict=True))
        row["theirs_graph"], row["theirs"], row["theirs_step"] = parts
        row["ratio"], row["ratio_again"] = row["theirs"] / row["ours"], row["theirs"] / row["again"]
        row["ratio_step"] = row["theirs_step"] / row["again"]
        row["ratio_other_widths"] = row["theirs"] / row["other_widths"]
    if reason:
        row["theirs_reason"] = reason
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def line_of(row: dict) -> str:
    """Return a row as one line for the terminal."""
    ratios = "  ".join(f"{key} {row.get(key, 0):.1f}x" for key in RATIOS)
    return (
        f"{row['model']:42s} forward {row['forward']:.3f}  trace {row['trace']:.3f}  ours {row['ours']:.3f}  again "
        f"{row['again']:.3f}  theirs {row.get('theirs', math.nan):.3f} s  {ratios}  memory "
        f"{row['memory_over_model']:.2f}  {row.get('theirs_reason', '')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), help="some models; nothing is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which Torch-Pruning is not run again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.time()
    rows = []
    for name, size in MODELS.items():
        if options.only and name not in options.only:
            continue
        rows.append(measure(name, size, options.repeats, options.limit))
        row = rows[-1]
        print(line_of(row), flush=True)
    both = [row for row in rows if "ratio" in row]
    summary = {
        f"geometric_mean_{key}": round(math.exp(statistics.fmean(math.log(row[key]) for row in both)), 2)
        for key in RATIOS
        if both
    }
    summary |= {"models_both_do": len(both), "slowest_ratio": min((row["ratio"] for row in both), default=None)}
    print(summary)
    if not options.only:
        what = "seconds from a network to the same with half of its channels, ours and Torch-Pruning 1.6.1"
        write_json(RESULT, {"what": what, **provenance(time.time() - start), **summary, "results": rows})


if __name__ == "__main__":
    main()
