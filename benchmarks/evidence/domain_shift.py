"""IBN-Net and MixStyle where images look otherwise than those trained on: shifted copies, and domains left out.

    python benchmarks/evidence/domain_shift.py ibn-net|mixstyle

Written before any result. Digits of scikit-learn, enlarged to 16 px, three channels; ResNet-8 with 16, 32 and 64
channels, batches of 64, SGD at 0.1, 3 seeds of split, weights and order; the same seed draws the same
images for all methods.

- ibn-net: trained on 718 plain digits for 12 epochs, tested on the others as they are, with a gain of 0.4 to 1.6 a
  channel, an offset of up to 0.3 a channel, a gamma of 0.5 to 2, and blurred. IBN-a and IBN-b in the first two stages
  (maps are 4 px in the third). Expected: clean within a point, shifted IBN-b over IBN-a over batch norm.
- mixstyle: four domains made of the digits: plain; coloured figure on a coloured ground; blurred with little contrast;
  on a texture with gain and offset. Trained on three of them (360 images each, 10 epochs), tested on the fourth.
  MixStyle (p = 0.5, alpha = 0.1) behind the first two stages, random partners; IBN-a, and both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from _figures import RESULTS, against, shown, write_rows
from _work import digits, fit, percent_right
from torch import Tensor, nn
from torch.nn import functional

from convette._files import write_json
from convette.models.cifar_resnet import resnet8
from convette.surgery import Conversion, convert_by

IBN_A = Conversion("to_ibn", options={"variant": "a", "stages": 2})
IBN_B = Conversion("to_ibn", options={"variant": "b", "stages": 2})
MIX = Conversion("MixStyle", after=("layer1", "layer2"))


def made(seed: int, *conversions: Conversion) -> nn.Module:
    """Return the network of a seed, converted."""
    torch.manual_seed(seed)
    model = resnet8(10, 3)
    convert_by(model, *conversions, example=torch.zeros(2, 3, 16, 16))
    return model


def enlarged(images: Tensor) -> Tensor:
    """Return (n, 1, 8, 8) images as (n, 1, 16, 16)."""
    return functional.interpolate(images, size=16, mode="bilinear", align_corners=False)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return a random number for each image and channel, (n, 3, 1, 1)."""
    return low + (high - low) * torch.rand(count, 3, 1, 1, generator=generator)


def blurred(images: Tensor) -> Tensor:
    """Return `images` under a 5x5 mean."""
    return functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)


def shifts(seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the changes of appearance by name."""
    g = torch.Generator().manual_seed(1000 + seed)
    return {
        "clean": lambda x: x,
        "gain": lambda x: x * uniform(len(x), 0.4, 1.6, g),
        "offset": lambda x: x + uniform(len(x), -0.3, 0.3, g),
        "gamma": lambda x: x ** (2 ** uniform(len(x), -1, 1, g)),
        "blur": blurred,
    }


def domains(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Return `images` (n, 1, 16, 16) in four renderings of three channels."""
    g = torch.Generator().manual_seed(2000 + seed)
    count = len(images)
    figure, ground = uniform(count, 0.4, 1.0, g), uniform(count, 0.0, 0.6, g)
    rows = torch.linspace(0, 1, 16).view(1, 1, 16, 1)
    columns = torch.linspace(0, 1, 16).view(1, 1, 1, 16)
    waves = torch.sin(
        40 * (uniform(count, -1, 1, g) * rows + uniform(count, -1, 1, g) * columns) + uniform(count, 0, 6, g)
    )
    texture = (0.25 + 0.15 * waves) * uniform(count, 0.5, 1.5, g) + uniform(count, -0.1, 0.2, g)
    return {
        "plain": images.expand(-1, 3, -1, -1).contiguous(),
        "coloured": images * figure + (1 - images) * ground,
        "faint": 0.3 + 0.35 * blurred(images).expand(-1, 3, -1, -1),
        "textured": images * 0.8 + (1 - images) * texture,
    }


def ibn_net(seeds: int) -> None:
    """Train on plain digits, test on shifted ones."""
    started = time.monotonic()
    variants = {"batch norm": [], "IBN-a": [IBN_A], "IBN-b": [IBN_B]}
    names = list(shifts(0))
    found: dict[str, dict[str, list[float]]] = {v: {n: [] for n in names} for v in variants}
    for seed in range(seeds):
        images, labels, test, truth = digits(seed)
        images, test = (enlarged(x).expand(-1, 3, -1, -1).contiguous() for x in (images, test))
        for variant, conversions in variants.items():
            model = fit(made(seed, *conversions), images, labels, epochs=12, batch=64, rate=0.1, seed=seed)
            for name, change in shifts(seed).items():
                found[variant][name].append(percent_right(model, change(test), truth))
    mean = {v: [statistics.fmean(found[v][n][s] for n in names[1:]) for s in range(seeds)] for v in variants}
    rows = {v: [*(shown(found[v][n]) for n in names), shown(mean[v])] for v in variants}
    base = "batch norm"
    summary = (
        f"ResNet-8 trained on 718 plain digits, {seeds} seeds. Mean over the shifted tests against batch norm: IBN-a "
        f"{against(mean['IBN-a'], mean[base])}, IBN-b {against(mean['IBN-b'], mean[base])} points; clean: IBN-a "
        f"{against(found['IBN-a']['clean'], found[base]['clean'])}, IBN-b "
        f"{against(found['IBN-b']['clean'], found[base]['clean'])} points."
    )
    write_rows("ibn-net", started, summary, [*names, "mean of shifts"], rows, accuracy=found)


def mixstyle(seeds: int) -> None:
    """Leave one domain out."""
    variants = {"vanilla": [], "MixStyle": [MIX], "IBN-a": [IBN_A], "IBN-a + MixStyle": [IBN_A, MIX]}
    names = ["plain", "coloured", "faint", "textured"]
    # Finished trainings are kept, so that a stopped run goes on.
    kept = RESULTS / "mixstyle.part.json"
    done: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    found: dict[str, dict[str, list[float]]] = {v: {n: [] for n in names} for v in variants}
    within: dict[str, list[float]] = {v: [] for v in variants}
    for seed in range(seeds):
        images, labels, test, truth = digits(seed, 1080)
        train, held = domains(enlarged(images), seed), domains(enlarged(test), 500 + seed)
        for out in names:
            rest = [name for name in names if name != out]
            # Each image is seen in one domain only: styles, not more digits.
            part = {name: slice(360 * k, 360 * (k + 1)) for k, name in enumerate(rest)}
            x = torch.cat([train[name][part[name]] for name in rest])
            y = torch.cat([labels[part[name]] for name in rest])
            for variant, conversions in variants.items():
                key = f"{seed}/{out}/{variant}"
                if key not in done:
                    begun = time.monotonic()
                    model = fit(made(seed, *conversions), x, y, epochs=10, batch=64, rate=0.1, seed=seed)
                    others = statistics.fmean(percent_right(model, held[name], truth) for name in rest)
                    done[key] = [percent_right(model, held[out], truth), others, time.monotonic() - begun]
                    write_json(kept, done)
                found[variant][out].append(done[key][0])
                within[variant].append(done[key][1])
    mean = {v: [statistics.fmean(found[v][n][s] for n in names) for s in range(seeds)] for v in variants}
    rows = {
        v: [*(shown(found[v][n]) for n in names), shown(mean[v]), f"{statistics.fmean(within[v]):.1f}"]
        for v in variants
    }
    base, both = mean["vanilla"], "IBN-a + MixStyle"
    known = [f"{statistics.fmean(within[v]):.1f} %" for v in ("vanilla", "MixStyle")]
    summary = (
        f"ResNet-8 trained on three renderings of the digits, tested on the fourth, {seeds} seeds. Mean over the four "
        f"against vanilla: MixStyle {against(mean['MixStyle'], base)}, IBN-a {against(mean['IBN-a'], base)}, both "
        f"{against(mean[both], base)} points. New images of the domains trained on: {known[0]} vanilla, {known[1]} "
        "with MixStyle."
    )
    columns = [*(f"{name} left out" for name in names), "mean", "domains trained on"]
    kept.unlink()
    started = time.monotonic() - sum(seconds for _, _, seconds in done.values())
    write_rows("mixstyle", started, summary, columns, rows, accuracy=found, within=within)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("slug", choices=["ibn-net", "mixstyle"])
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.slug == "ibn-net":
        ibn_net(arguments.seeds or 3)
    else:
        mixstyle(arguments.seeds or 3)
