"""What each layer costs beside what it replaces: parameters, MACs, a training step, inference. All in one run.

    python benchmarks/layers.py [--only atac,soag] [--rounds 15]

Each case builds a network (or one layer) without and with the system. They take turns, `rounds` times; shown are
medians of CPU milliseconds of one thread and of the ratio within a turn, with its quartiles. A training step is forward
and backward of the sum of squares of the outputs, in training mode; inference is forward in eval mode, after
`convette.fold`. Writes benchmarks/results/layers.json; with --only the other systems' figures stay as they were.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.cost import count
from convette.layers import Stays
from convette.models import CifarResNet, create_model
from convette.surgery import Conversion, convert_by, fold

RESULT = Path(__file__).parent / "results/layers.json"
CIFAR = (16, 3, 32, 32)


@dataclass(frozen=True)
class Case:
    """Two networks for the same input, and what they are called in the table."""

    baseline: str
    method: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...] = CIFAR


def converted(
    name: str, *conversions: Conversion, shape: tuple[int, ...] = CIFAR
) -> Callable[[], tuple[nn.Module, ...]]:
    """Return a builder of the network `name`, as it is and converted."""

    def build() -> tuple[nn.Module, nn.Module]:
        plain, changed = (create_model(name, num_classes=10, in_channels=shape[1], seed=0) for _ in range(2))
        convert_by(changed, *conversions, example=torch.randn(2, *shape[1:]))
        return plain, changed

    return build


def behind_convolution(make: Callable[[], nn.Module], channels: int = 32) -> Callable[[], tuple[nn.Module, nn.Module]]:
    """Return a builder of a convolution with norm and ReLU, and of the same with a layer before the ReLU."""

    def build() -> tuple[nn.Module, nn.Module]:
        def unit(*layers: nn.Module) -> nn.Module:
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels), *layers, nn.ReLU())

        return unit(), unit(make())

    return build


MAPS = (16, 32, 16, 16)


def systems() -> dict[str, list[Case]]:
    """Return the cases of each system by slug."""
    from convette.layers.activation import ATAC, LateralInhibition2d
    from convette.layers.attention import HigherOrderBlock, LightNonLocal2d, SoAG
    from convette.layers.complex import ComplexConv2d
    from convette.layers.convolution import FactorizedConv2d, QuadraticConv2d
    from convette.layers.hyperbolic import PoincareConv2d
    from convette.layers.regularization import MaxDropout
    from convette.layers.routing import CrossConnection

    class Kept(FactorizedConv2d):
        """What the layer costs as it is."""

        def folded(self) -> nn.Module:
            raise Stays("Measured as it is.")

    unit = "conv 3x3, norm, ReLU (32 ch., 16 px)"
    return {
        "lateral-inhibition": [
            Case(unit, "with inhibition", behind_convolution(lambda: LateralInhibition2d(32)), MAPS),
            Case(
                "ResNet-20",
                "inhibition at stage ends",
                converted("resnet20", Conversion("add_inhibition", options={"init": 0.1})),
            ),
        ],
        "maxdropout": [
            Case(unit, "with MaxDropout", behind_convolution(lambda: MaxDropout()), MAPS),
            Case("ResNet-20", "MaxDropout behind stages", converted("resnet20", Conversion("insert_after_stages"))),
        ],
        "atac": [
            Case("ReLU (32 ch., 16 px)", "ATAC", lambda: (nn.ReLU(), ATAC(32)), MAPS),
            Case(
                "ResNet-20",
                "inner ReLUs by ATAC",
                converted("resnet20", Conversion("replace_activation", options={"stage_count": 3})),
            ),
        ],
        "soag": [
            Case(unit, "with SoAG, 64 filters", behind_convolution(lambda: SoAG(32, 64)), MAPS),
            Case(
                "ResNet-20",
                "SoAG behind stages",
                converted("resnet20", Conversion("add_soag", options={"filters": 64})),
            ),
        ],
        "light-nonlocal": [
            Case(unit, "with LightNL", behind_convolution(lambda: LightNonLocal2d(32)), MAPS),
            Case(
                "MobileNetV2 x 0.35 (64 px)",
                "LightNL behind its stages",
                converted(
                    "mobilenet_v2_035", Conversion("insert_nonlocal", options={"at": "stage"}), shape=(8, 3, 64, 64)
                ),
                (8, 3, 64, 64),
            ),
        ],
        "quadratic-convolution": [
            Case(
                "conv 3x3, 3 to 16 ch., 32 px",
                "full form",
                lambda: (nn.Conv2d(3, 16, 3, padding=1), QuadraticConv2d(3, 16, 3, padding=1)),
            ),
            Case(
                "conv 3x3, 3 to 16 ch., 32 px",
                "rank 2",
                lambda: (nn.Conv2d(3, 16, 3, padding=1), QuadraticConv2d(3, 16, 3, padding=1, rank=2)),
            ),
            Case(
                "ResNet-20",
                "full form in the stem",
                converted("resnet20", Conversion("to_quadratic", options={"rank": None})),
            ),
        ],
        "tensor-compressed-convolution": [
            Case(
                "conv 3x3, 64 to 64 ch., 16 px",
                f"R = {rank}, {'folded' if make is FactorizedConv2d else 'as it is'}",
                lambda rank=rank, make=make: (
                    nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)),
                    nn.Sequential(make(64, 64, 3, padding=1, rank=rank)),  # a layer with children folds in a network
                ),
                (16, 64, 16, 16),
            )
            for rank, make in ((1, Kept), (2, Kept), (4, Kept), (2, FactorizedConv2d))
        ],
        "higher-order-operations": [
            Case(unit, "with a higher-order block", behind_convolution(lambda: HigherOrderBlock(32)), MAPS),
            Case("ResNet-20", "behind every second block", converted("resnet20", Conversion("insert_higher_order"))),
        ],
        "cross-connections": [
            Case(unit, "with connections, 2 x 16", behind_convolution(lambda: CrossConnection(16, 2)), MAPS),
            Case("ResNet-20", "two paths", converted("resnet20", Conversion("multipath"))),
        ],
        "complex-convolution": [
            Case(
                "conv 3x3, 16 to 16 ch., 32 px",
                "complex, 16 to 16 complex ch.",
                lambda: (nn.Conv2d(16, 16, 3, padding=1), ComplexConv2d(16, 16, 3, padding=1, complexify="zero")),
                (16, 16, 32, 32),
            ),
            Case("ResNet-20", "complex", converted("resnet20", Conversion("to_complex"))),
        ],
        "poincare-resnet": [
            Case(
                "conv 3x3, 16 to 16 ch., 32 px",
                "on the ball",
                lambda: (nn.Conv2d(16, 16, 3, padding=1), PoincareConv2d(16, 16, 3, padding=1)),
                (16, 16, 32, 32),
            ),
            Case(
                "ResNet-20, 8-16-32",
                "Poincaré ResNet-20, 8-16-32",
                lambda: (CifarResNet(20, widths=(8, 16, 32)), create_model("poincare_resnet20", seed=0)),
            ),
        ],
    }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().sum().backward()


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def turns(work: Callable[[nn.Module, Tensor], None], models: Sequence[nn.Module], x: Tensor, rounds: int) -> Any:
    """Return median milliseconds of each model and median and quartiles of the ratio of the second to the first."""
    spent: list[list[float]] = [[], []]
    for index in range(rounds + 2):
        for model, own in zip(models, spent, strict=True):
            start = time.process_time()
            work(model, x)
            if index > 1:  # two rounds to warm up
                own.append((time.process_time() - start) * 1000)
    ratios = [b / a for a, b in zip(*spent, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = [round(statistics.median(own), 3) for own in spent]
    return {"milliseconds": medians, "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    models = case.build()
    x = torch.randn(*case.shape, generator=torch.Generator().manual_seed(1))
    trained = turns(step, [model.train() for model in models], x.clone().requires_grad_(), rounds)
    folded = [_folded(model.eval(), x[:1]) for model in models]
    return {
        "baseline": case.baseline,
        "method": case.method,
        "input": list(case.shape),
        "parameters": [parameters(model) for model in models],
        "macs": [count(model, x[:1]).macs for model in models],
        "training_step": trained,
        "inference": turns(infer, folded, x, rounds),
    }


def _folded(model: nn.Module, x: Tensor) -> nn.Module:
    # A layer alone is put into a network, so that it can be folded itself.
    return fold(model if len(list(model.children())) else nn.Sequential(model), x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="slugs with commas")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = systems()
    chosen = [slug for slug in arguments.only.split(",") if slug] or list(known)
    found = json.loads(RESULT.read_text())["systems"] if RESULT.exists() else {}
    for slug in chosen:
        started = time.monotonic()
        cases = [measure(case, arguments.rounds) for case in known[slug]]
        found[slug] = {"cases": cases, "rounds": arguments.rounds} | provenance(time.monotonic() - started)
        for case in cases:
            ratios = case["training_step"]["ratio"], case["inference"]["ratio"]
            note(f"{slug}: {case['method']}: training step {ratios[0]:.2f} times, inference {ratios[1]:.2f} times")
        write_json(RESULT, {"what": (__doc__ or "").split("\n")[0], "systems": found})


if __name__ == "__main__":
    main()
