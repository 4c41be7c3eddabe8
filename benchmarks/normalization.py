"""What each normaliser costs: a training step against batch norm, eager and compiled, and inference after folding.

    python benchmarks/normalization.py [--only "sparse switchable"] [--rounds 15] [--eager]

One thread, float32, channels_last, maps of 64 channels and 16 x 16 values, batches of 8 and 128. A step is the forward
and the backward pass of the layer alone, with gradients of input and parameters. All layers of a batch size take turns
in one run, some repetitions of about ten milliseconds each; the ratio is the median over rounds of a layer's time over
batch norm's in the same round. WeightAlign changes a convolution: there both sides are a 3x3 convolution, with batch
norm on the one and aligned weights on the other; the final batch norm's other side is a linear layer with batch norm.

Inference: a network of three convolutions, each with the normaliser and ReLU, and a linear layer, folded
(`convette.fold`), against the same of batch norm folded, eager, batch 8.

Writes benchmarks/results/normalization.json. Compiled steps are made once a layer and batch size, which is most of the
time: about four minutes in all on a quiet machine, seconds with --eager.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.cost import count
from convette.layers.normalization import (
    IBN,
    BilinearNorm2d,
    BNET2d,
    ConsistentBatchNorm2d,
    FilteredBatchNorm2d,
    FinalNormLinear,
    MixStyle,
    NormLoss,
    SkewReducedBatchNorm2d,
    SparseSwitchNorm2d,
    WAConv2d,
)
from convette.surgery import fold, what_stays

RESULT = Path(__file__).parent / "results" / "normalization.json"
C, SIDE, BATCHES = 64, 16, (8, 128)


def switching() -> nn.Module:
    """Return a switchable layer in the middle of its training."""
    layer = SparseSwitchNorm2d(C)
    with torch.no_grad():
        layer.mean_logits.copy_(torch.tensor([0.9, 1.0, 1.1]))
    layer.set_radius(0.3)
    return layer


class WithNormLoss(nn.Module):
    """A convolution and batch norm, whose filters' norms are added to what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.loss = [NormLoss(self.layer)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.loss[0]()


def convolution(norm: nn.Module | None = None) -> nn.Module:
    conv = nn.Conv2d(C, C, 3, padding=1, bias=norm is None)
    return nn.Sequential(conv, nn.BatchNorm2d(C) if norm is None else norm)


# The layer of a step, and the name of what it is compared with.
LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(C), "batch norm"),
    "group norm": (lambda: nn.GroupNorm(8, C), "batch norm"),
    "sparse switchable": (switching, "batch norm"),
    "filtered": (lambda: FilteredBatchNorm2d(C), "batch norm"),
    "skewness-reduced": (lambda: SkewReducedBatchNorm2d(C), "batch norm"),
    "BNET-3": (lambda: BNET2d(C), "batch norm"),
    "IBN": (lambda: IBN(C), "batch norm"),
    "consistent, clean half": (lambda: ConsistentBatchNorm2d(C, stats="clean"), "batch norm"),
    "bilinear, of maps": (lambda: BilinearNorm2d(SIDE, SIDE), "batch norm"),
    "MixStyle, p = 0.5": (lambda: MixStyle(), "batch norm"),
    "conv + batch norm": (lambda: convolution(), "conv + batch norm"),
    "conv + WeightAlign": (lambda: WAConv2d(C, C, 3, padding=1), "conv + batch norm"),
    "conv + batch norm + norm loss": (WithNormLoss, "conv + batch norm"),
    "linear + batch norm": (lambda: nn.Sequential(nn.Linear(C, 10), nn.BatchNorm1d(10)), "linear + batch norm"),
    "linear + final batch norm": (lambda: FinalNormLinear(C, 10), "linear + batch norm"),
}
# The norm of the network whose inference is timed.
FOLDED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(C),
    "sparse switchable, batch norm picked": lambda: SparseSwitchNorm2d(C, candidates=["bn"]),
    "sparse switchable, instance norm picked": lambda: SparseSwitchNorm2d(C, candidates=["in"]),
    "filtered": lambda: FilteredBatchNorm2d(C),
    "skewness-reduced": lambda: SkewReducedBatchNorm2d(C),
    "skewness-reduced, annealed to p = 1": lambda: SkewReducedBatchNorm2d(C, 1.0),
    "BNET-3": lambda: BNET2d(C),
    "IBN": lambda: IBN(C),
    "consistent, clean half": lambda: ConsistentBatchNorm2d(C, stats="clean"),
    "MixStyle behind batch norm": lambda: nn.Sequential(nn.BatchNorm2d(C), MixStyle()),
    "WeightAlign": lambda: nn.Identity(),
}


# What of the tables above stands on the page of a system.
SYSTEMS: dict[str, tuple[list[str], list[str]]] = {
    "sparse-switchable-normalization": (
        ["sparse switchable"],
        ["sparse switchable, batch norm picked", "sparse switchable, instance norm picked"],
    ),
    "filtered-batch-norm": (["filtered"], ["filtered"]),
    "skewness-batch-norm": (["skewness-reduced"], ["skewness-reduced", "skewness-reduced, annealed to p = 1"]),
    "bnet": (["BNET-3"], ["BNET-3"]),
    "ibn-net": (["IBN"], ["IBN"]),
    "consistent-normalization": (["consistent, clean half"], ["consistent, clean half"]),
    "bilinear-normalization": (["bilinear, of maps"], []),
    "mixstyle": (["MixStyle, p = 0.5"], ["MixStyle behind batch norm"]),
    "weight-align": (["conv + WeightAlign"], ["WeightAlign"]),
    "norm-loss": (["conv + batch norm + norm loss"], []),
    "final-batch-norm": (["linear + final batch norm"], []),
}


def counts(name: str) -> list[int]:
    """Return parameters and MACs (at one input) of a layer and of what it is compared with."""
    found = []
    for one in (name, LAYERS[name][1]):
        layer = LAYERS[one][0]().eval()
        cost = count(layer, images(2, one)[:1])
        found += [sum(p.numel() for p in layer.parameters()), cost.macs]
    return found


def prices(found: dict[str, dict[str, float]], folded: dict[str, list[str]]) -> dict[str, Any]:
    """Return what the page of each system shows."""
    keys = [f"{kind} {batch}" for kind in ("eager", "compiled") for batch in BATCHES]
    systems = {}
    for slug, (steps, after) in SYSTEMS.items():
        cases = []
        for name in steps:
            parameters, macs, before, macs_before = counts(name)
            ratios = [f"{found[name][f'{key} ratio']:.2f}" for key in keys]
            shown = [f"{parameters:,} ({before:,})", f"{macs:,} ({macs_before:,})", *ratios]
            cases.append([name, LAYERS[name][1], *shown])
        systems[slug] = {"steps": cases, "folded": [[name, *folded[name]] for name in after]}
    return systems


def images(batch: int, name: str) -> Tensor:
    torch.manual_seed(0)
    if name.startswith("linear"):
        return torch.randn(batch, C)
    return torch.randn(batch, C, SIDE, SIDE).contiguous(memory_format=torch.channels_last)


def stepper(name: str, batch: int, compiled: bool) -> Callable[[], None]:
    """Return a training step of a layer."""
    torch.manual_seed(1)
    layer: Any = LAYERS[name][0]().train().to(memory_format=torch.channels_last)
    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, fullgraph=True, dynamic=False)
    x = images(batch, name).requires_grad_()
    upstream = torch.randn_like(layer(x))

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)

    step()
    return step


def measured(steps: dict[str, Callable[[], None]], rounds: int, budget: float = 0.01) -> dict[str, list[float]]:
    """Return seconds of one repetition, a number a round, all taking turns."""
    repetitions = {}
    for name, step in steps.items():
        step()
        started = time.perf_counter()
        step()
        repetitions[name] = max(1, int(budget / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                for _ in range(repetitions[name]):
                    step()
                seconds[name].append((time.perf_counter() - started) / repetitions[name])
    finally:
        gc.enable()
    return seconds


def training(names: list[str], rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Return, for each layer, milliseconds and ratio at each batch size."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    kind = "compiled" if compiled else "eager"
    for batch in BATCHES:
        steps = {}
        for name in names:
            started = time.monotonic()
            steps[name] = stepper(name, batch, compiled)
            if compiled:
                note(f"compiled {name}, batch {batch}: {time.monotonic() - started:.0f} s")
        seconds = measured(steps, rounds)
        for name in names:
            base = seconds[LAYERS[name][1]]
            ratios = [a / b for a, b in zip(seconds[name], base, strict=True)]
            found[name][f"{kind} {batch} ms"] = 1e3 * statistics.median(seconds[name])
            found[name][f"{kind} {batch} ratio"] = statistics.median(ratios)
    return found


def network(name: str) -> nn.Module:
    torch.manual_seed(2)
    parts: list[nn.Module] = []
    for _ in range(3):
        conv = WAConv2d(C, C, 3, padding=1) if name == "WeightAlign" else nn.Conv2d(C, C, 3, padding=1, bias=False)
        parts += [conv, FOLDED[name](), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 10))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        model.train()(images(8, "maps"))
    return model.eval()


def inference(rounds: int) -> dict[str, tuple[float, float, bool]]:
    """Return milliseconds, ratio and whether all was folded, of each network after `fold`."""
    x = images(8, "maps")
    models = {name: fold(network(name), x) for name in FOLDED}
    for model in models.values():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def runner(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(x)

        return run

    with torch.no_grad():
        seconds = measured({name: runner(model) for name, model in models.items()}, rounds)
    base = seconds["batch norm"]
    return {
        name: (
            1e3 * statistics.median(times),
            statistics.median(a / b for a, b in zip(times, base, strict=True)),
            not what_stays(models[name]),
        )
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="a part of the names of layers to time, besides what they are compared with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true", help="leave the compiled steps out, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    names = [name for name in LAYERS if arguments.only is None or arguments.only in name]
    names = list(dict.fromkeys([*(LAYERS[name][1] for name in names), *names]))
    found = training(names, arguments.rounds, compiled=False)
    if not arguments.eager:
        for name, figures in training(names, arguments.rounds, compiled=True).items():
            found[name] |= figures
    after = inference(2 * arguments.rounds)
    keys = [f"{kind} {batch}" for kind in ("eager", "compiled") for batch in BATCHES]
    rows = {}
    for name in names:
        cells = [f"{found[name].get(f'{key} ratio', float('nan')):.2f}" for key in keys]
        rows[name] = [*cells, *(f"{found[name].get(f'{key} ms', float('nan')):.3g}" for key in keys)]
        note(f"{name:32} {'  '.join(rows[name])}")
    folded = {
        name: [f"{ratio:.2f}", f"{ms:.3g}", "yes" if whole else "no"] for name, (ms, ratio, whole) in after.items()
    }
    for name, cells in folded.items():
        note(f"folded {name:40} {'  '.join(cells)}")
    if arguments.only is None and not arguments.eager:
        columns = [f"{key}: x batch norm" for key in keys] + [f"{key}: ms" for key in keys]
        body = {
            "columns": columns,
            "rows": rows,
            "folded_columns": ["x batch norm", "ms", "all folded"],
            "folded": folded,
        }
        body["systems"] = prices(found, folded)
        write_json(RESULT, {**body, "figures": found, **provenance(time.monotonic() - started)})


if __name__ == "__main__":
    main()
