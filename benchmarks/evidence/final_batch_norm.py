"""Final batch norm on imbalanced pairs of digits: 120 images of one class, 2 of the other; tested on 50 of each.

    python benchmarks/evidence/final_batch_norm.py

Written before any result: pairs 3 and 8, 1 and 8, 4 and 9 (the second is rare); three convolutions of 16 channels with
batch norm, 30 epochs of batches of 32, SGD at 0.05; 5 seeds, of the images, the weights and their order. Final batch
norm with momentum 0.1, folded into the classifier, and left out ("dropped"); baseline; class weights. A control (61
of each) should show no difference. Expected: the folded one gains more than 0.2 of the rare class's F1.
"""

import statistics
import time

import torch
from _figures import against, shown, write_rows
from _work import digits, fit, percent_right, predicted
from torch import Tensor, nn

from convette.layers.normalization import FinalNormLinear, remove_final_norm

PAIRS = ((3, 8), (1, 8), (4, 9))
SEEDS = 5


def network(final: bool, seed: int) -> nn.Sequential:
    """Return the network, with a final batch norm or a plain classifier."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (1, 16, 16):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = FinalNormLinear(16, 2) if final else nn.Linear(16, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def pair(common: int, rare: int, counts: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (`counts` of both classes) and 50 test images of each; labels 0 and 1 (rare)."""
    images, labels, more, also = digits(seed, 1797 - 1)
    images, labels = torch.cat([images, more]), torch.cat([labels, also])
    of = [torch.nonzero(labels == digit).flatten() for digit in (common, rare)]
    train = torch.cat([of[0][: counts[0]], of[1][: counts[1]]])
    test = torch.cat([of[0][-50:], of[1][-50:]])
    return images[train], (labels[train] == rare).long(), images[test], (labels[test] == rare).long()


def figures(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return F1 of the rare class and balanced accuracy, 0 to 1."""
    found = predicted(model, images)
    hits = float(((found == 1) & (labels == 1)).sum())
    f1 = 2 * hits / max(float((found == 1).sum() + (labels == 1).sum()), 1.0)
    recalls = [float((found[labels == k] == k).float().mean()) for k in (0, 1)]
    return f1, statistics.fmean(recalls)


def main() -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    f1: dict[str, list[float]] = {}
    balanced: dict[str, list[float]] = {}
    control: dict[str, list[float]] = {"baseline": [], "final batch norm, folded": []}

    def note(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        one, other = figures(model, images, labels)
        f1.setdefault(name, []).append(one)
        balanced.setdefault(name, []).append(other)

    for seed in range(SEEDS):
        for common, rare in PAIRS:
            images, labels, test, truth = pair(common, rare, (120, 2), seed)
            how = {"epochs": 30, "batch": 32, "rate": 0.05, "seed": seed}
            weights = torch.tensor([122 / 240, 122 / 4])
            note("baseline", fit(network(False, seed), images, labels, **how), test, truth)
            weighted = fit(network(False, seed), images, labels, class_weights=weights, **how)
            note("class weights", weighted, test, truth)
            final = fit(network(True, seed), images, labels, **how)
            dropped = network(True, seed)
            dropped.load_state_dict(final.state_dict())
            note("final batch norm, folded", remove_final_norm(final, "fold"), test, truth)
            note("final batch norm, dropped", remove_final_norm(dropped, "drop"), test, truth)
            images, labels, test, truth = pair(common, rare, (61, 61), seed)
            for name, with_norm in (("baseline", False), ("final batch norm, folded", True)):
                model = fit(network(with_norm, seed), images, labels, **how)
                control[name].append(percent_right(model, test, truth))
    rows = {
        name: [
            shown(f1[name], digits=2),
            shown(balanced[name], digits=2),
            f"{statistics.fmean(control[name]):.1f}" if name in control else "-",
        ]
        for name in f1
    }
    folded = "final batch norm, folded"
    other = f1["class weights"]
    summary = (
        f"Trained on 120 images of one digit and 2 of another, tested on 50 of each, {len(PAIRS)} pairs and {SEEDS} "
        f"seeds: final batch norm, folded, changes the rare class's F1 by {against(f1[folded], f1['baseline'], 2)} "
        f"against the baseline and by {against(f1[folded], other, 2)} against class weights; balanced accuracy by "
        f"{against(balanced[folded], balanced['baseline'], 2)}. Trained on 61 of each, accuracy changes by "
        f"{against(control[folded], control['baseline'])} points. Naming the rare class always gives an F1 of 0.67."
    )
    columns = ["F1 of the rare class", "balanced accuracy", "accuracy in %, balanced training"]
    write_rows("final-batch-norm", started, summary, columns, rows, f1=f1, balanced=balanced, control=control)


if __name__ == "__main__":
    main()
