"""Paths with feature-dependent cross-connections against one path, a wider one, and paths without them.

    python benchmarks/evidence/cross_connections.py [--shared ../shared/data] [--seeds 3]

Fixed before any result was seen. Two kinds of images in one task of 20 classes, at 10x10: scikit-learn's digits (1,200
to learn from, the other 597 to test) and Fashion-MNIST (1,200 and 1,000). A residual network of three blocks: one path
of width 12, one of width 17 (about twice the parameters), two paths of width 12 with averaged features, and the
same with cross-connections; 5 epochs. Expected: cross-connections at least .3 points over
independent paths, at least level with the wide one; mean routes of digits and clothes that differ by more than .05.
"""

import time

import torch
from _figures import Figures, told, write_runs
from _work import accuracy, all_digits, images_of, load, options, over_seeds, train
from torch import Tensor, nn
from torch.nn import functional

from convette.layers.routing import CrossConnection, multipath, route_report
from convette.models import CifarResNet

SIDE, CLOTHES, CLOTHES_TEST, DIGITS, EPOCHS = 10, 1200, 1000, 1200, 5


def sized(images: Tensor) -> Tensor:
    resized = functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return resized * 2 - 1


def network(width: int = 12) -> CifarResNet:
    return CifarResNet(8, 20, 1, (width, 2 * width, 4 * width))


def main() -> None:
    arguments = options(__doc__, shared=True)
    started = time.monotonic()
    ink, numbers = all_digits()
    ink = sized(ink)
    fashion = load("fashion-mnist", arguments.shared)
    clothes, kinds = images_of(fashion, "train", CLOTHES)
    clothes_test, kinds_test = images_of(fashion, "test", CLOTHES_TEST)
    inputs, targets = torch.cat([ink[:DIGITS], sized(clothes)]), torch.cat([numbers[:DIGITS], kinds + 10])
    test, wanted = torch.cat([ink[DIGITS:], sized(clothes_test)]), torch.cat([numbers[DIGITS:], kinds_test + 10])

    def run(model: nn.Module, seed: int) -> Figures:
        train(model, inputs, targets, functional.cross_entropy, epochs=EPOCHS, seed=seed)
        routed = any(isinstance(module, CrossConnection) for module in model.modules())
        apart = 0.0
        if routed:
            report = route_report(model, [(test, wanted)])
            gaps = [(routes[:10].mean(0) - routes[10:].mean(0)).abs().max() for routes in report.values()]
            apart = float(torch.stack(gaps).max())
        numbers_right = accuracy(model, test[: len(ink) - DIGITS], wanted[: len(ink) - DIGITS])
        return {"accuracy": accuracy(model, test, wanted), "digits alone": numbers_right, "routes apart": apart}

    arms = {
        "one path, 12": lambda _: network(),
        "one path, 17": lambda _: network(17),
        "two paths, independent": lambda _: multipath(network(), at=()),
        "two paths, cross-connections": lambda _: multipath(network()),
    }
    found = over_seeds(arms, arguments.seeds, run)
    method = "two paths, cross-connections"
    apart = sum(item["routes apart"] for item in found[method]) / arguments.seeds
    summary = (
        f"Digits and clothes in one task of 20 classes, {arguments.seeds} seeds."
        f" {told(found, method, 'two paths, independent', 'accuracy')}"
        f" {told(found, method, 'one path, 17', 'accuracy')}"
        f" Mean routes of digits and clothes differ by {apart:.2f} at most (expected above 0.05)."
    )
    settings = {"side": SIDE, "digits": DIGITS, "clothes": CLOTHES, "epochs": EPOCHS}
    shares = ("accuracy", "digits alone")
    write_runs("cross-connections", summary, found, started, shares=shares, settings=settings)


if __name__ == "__main__":
    main()
