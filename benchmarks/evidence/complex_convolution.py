"""Complex against real networks, of as many channels and of twice the parameters, on data that are complex.

    python benchmarks/evidence/complex_convolution.py [--seeds 3]

Fixed before any result was seen. scikit-learn's digits (1,200 to learn from, 597 to test), 12 epochs, three 3x3
convolutions of 8, 16 and 32 channels. "spectra": orthonormal 2-D Fourier transforms, each turned by a random global
phase; real networks read real and imaginary parts as two channels. "images": the digits themselves, imaginary part 0.
Arms: cnn; cnn_x2 (real, widened to twice its parameters); cv_cnn (modReLU, magnitude norm, logits from |z|: global
phase cannot change them); cv_cnn, whitened (CReLU, whitening batch norm, which phase does change). Expected: on spectra
cv_cnn over cnn on the mean; on images differences within a point.
"""

import math
import time

import torch
from _figures import Figures, told, write_runs
from _work import accuracy, all_digits, options, over_seeds, train
from torch import Tensor, nn
from torch.nn import functional

from convette.cost import count
from convette.layers.complex import as_pairs, draw_weights, match_params, to_complex

TRAIN, EPOCHS, WIDTHS = 1200, 12, (8, 16, 32)


def network(channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for index, width in enumerate(WIDTHS):
        into = channels if index == 0 else WIDTHS[index - 1]
        layers += [nn.Conv2d(into, width, 3, 1 if index == 0 else 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return draw_weights(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10)))


def spectra(images: Tensor, generator: torch.Generator) -> Tensor:
    phase = 2 * math.pi * torch.rand(len(images), 1, 1, 1, generator=generator)
    return as_pairs(torch.fft.fft2(images, norm="ortho") * torch.polar(torch.ones_like(phase), phase))


def main() -> None:
    seeds = options(__doc__).seeds
    started = time.monotonic()
    images, labels = all_digits()
    generator = torch.Generator().manual_seed(0)
    sets = {"spectra": spectra(images, generator), "images": images * 2 - 1}
    found: dict[str, list[Figures]] = {}
    for name, data in sets.items():
        channels, mode = data.shape[1], "pair" if name == "spectra" else "zero"

        def run(model: nn.Module, seed: int, data: Tensor = data) -> Figures:
            train(model, data[:TRAIN], labels[:TRAIN], functional.cross_entropy, epochs=EPOCHS, seed=seed)
            macs = count(model, data[:1]).macs / 1e6
            return {"accuracy": accuracy(model, data[TRAIN:], labels[TRAIN:]), "M MACs": macs}

        def turned(_: int, channels: int = channels, mode: str = mode) -> nn.Module:
            return to_complex(network(channels), "abs", mode, activation="modrelu", norm="magnitude")

        arms = {
            f"{name}: cnn": lambda _, c=channels: network(c),
            f"{name}: cnn_x2": lambda _, c=channels, x=data: match_params(network(c), x[:1]),
            f"{name}: cv_cnn": turned,
            f"{name}: cv_cnn, whitened": lambda _, c=channels, m=mode: to_complex(network(c), "abs", m),
        }
        found |= over_seeds(arms, seeds, run)
    summary = (
        f"Digits as spectra of unknown phase and as images, {seeds} seeds."
        f" {told(found, 'spectra: cv_cnn', 'spectra: cnn', 'accuracy')}"
        f" {told(found, 'spectra: cv_cnn', 'spectra: cnn_x2', 'accuracy')}"
        f" {told(found, 'images: cv_cnn', 'images: cnn_x2', 'accuracy')}"
    )
    settings = {"train": TRAIN, "epochs": EPOCHS, "widths": WIDTHS}
    write_runs("complex-convolution", summary, found, started, shares=("accuracy",), settings=settings)


if __name__ == "__main__":
    main()
