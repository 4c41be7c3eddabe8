"""Edge split: a bottleneck by head distillation, its filter, and answers over a link of several rates.

    python benchmarks/evidence/edge_split.py [--seeds 3] [--shared ../shared/data]

Writes benchmarks/evidence/results/edge-split.json. Fashion-MNIST at 56 px, 2400 training and 2000 test images; a small
residual network (Bi-Real-18's real twin, a quarter of its width) per seed, its first stage replaced by a bottleneck of
3 channels. HND imitates that stage, GHND the later ones too; 4 epochs each. Settings fixed before any result. Expected
from the sheet: GHND within 1 to 3 points of the teacher, HND 0 to 3 lower, 8 bits cost less than 0.3, the filter's
area under the curve above 0.95 (images with a garment against noise).

The link: a real loopback socket shaped to a rate, 5 ms each way. Both ends run here; the device is made DEVICE times
slower by waiting, so that there is something to gain. Means of 15 images.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _figures import paired, shown
from torch import Tensor, nn
from torch.nn import functional as F

from convette import create_model, load_data
from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.runtime.edge_split import (
    EdgeClient,
    EdgeServer,
    NeuralFilter,
    ShapedLink,
    cut,
    decode,
    distil_head,
    encode,
    inject,
    pick_threshold,
)

RESULT = Path(__file__).parent / "results" / "edge-split.json"
SIDE, TRAIN, TEST, EPOCHS, CHANNELS, DEVICE = 56, 2400, 2000, 4, 3, 20
RATES = (2e4, 1e5, 5e5, 1e7)
AT, LATER = "stages.0", ("stages.1", "stages.2", "stages.3")


def batches(images: Tensor, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    def epoch(number: int) -> tuple[Tensor, ...]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * seed + number))
        return tuple(images[part] for part in order.split(64))

    return epoch


def teach(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = 6 * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(6):
        for part in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    hits = sum(int((run(x).argmax(1) == y).sum()) for x, y in zip(images.split(100), labels.split(100), strict=True))
    return hits / len(labels)


def filter_area(model: nn.Module, images: Tensor, test: Tensor, seed: int) -> tuple[float, float]:
    """Train the filter on the stem's features; return the area under its curve, and what it drops at recall 0.99."""
    torch.manual_seed(seed)
    stem = cut(model, images[:2], "pool").head
    judge = NeuralFilter(16, side=28)

    def mixed(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = F.interpolate(torch.randn(len(x), 1, 14, 14), size=SIDE) * x.std()
        return torch.cat([x, noise]), torch.cat([torch.ones(len(x)), torch.zeros(len(x))]).long()

    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    for part in images[:1000].split(50):
        x, worth = mixed(part)
        loss = F.cross_entropy(judge(stem(x)), worth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge.eval()
    with torch.no_grad():
        x, worth = mixed(test[:500])
        scores, truth = judge.score(stem(x)).numpy(), worth.numpy().astype(bool)
    order = scores[truth][:, None] - scores[~truth][None]
    area = float((order > 0).mean() + 0.5 * (order == 0).mean())
    threshold = pick_threshold(scores, truth, 0.99)
    return area, float((scores[~truth] < threshold).mean())


def slow(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`run` on a device DEVICE times slower: it waits."""

    def later(x: Tensor) -> Tensor:
        began = time.perf_counter()
        outputs = run(x)
        time.sleep((DEVICE - 1) * (time.perf_counter() - began))
        return outputs

    return later


def over_the_link(teacher: nn.Module, student: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Mean seconds an image of each way to answer, at each rate; and the bytes sent."""
    parts = cut(student, images[:2], f"{AT}.encoder")
    raw = ((images - images.min()) / (images.max() - images.min()) * 255).to(torch.uint8)
    low, span = images.min(), images.max() - images.min()

    def whole(x: Tensor) -> Tensor:
        return teacher(x.float() / 255 * span + low)

    found: dict[str, dict[str, float]] = {}
    for rate in RATES:
        row: dict[str, float] = {}
        local = slow(teacher)
        with torch.no_grad():
            began = time.perf_counter()
            for image in images.split(1):
                local(image)
            row["local"] = (time.perf_counter() - began) / len(images)
        ways = {"remote": (whole, lambda x: x, raw), "split": (parts.tail, slow(parts.head), images)}
        for name, (server_runs, head, inputs) in ways.items():
            with (
                EdgeServer(server_runs) as server,
                ShapedLink(server.address, rate, 0.005) as link,
                EdgeClient(head, lambda x: teacher(x.float()), link.address, timeout=30) as client,
            ):
                answers = [client(image) for image in inputs.split(1)]
            row[name] = sum(answer.seconds for answer in answers) / len(answers)
            row[f"{name} bytes"] = answers[-1].bytes_sent
            assert all(answer.where == "remote" for answer in answers)
        found[f"{rate:.0f}"] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    data = load_data(f"parquet:{arguments.shared / 'fashion-mnist'}")
    sets = {}
    for name, split, count in (("train", data.train, TRAIN), ("test", data.test, TEST)):
        images = data.preprocessing(split.images(range(count)))
        sets[name] = (F.interpolate(images, size=SIDE, mode="bilinear"), split.labels[:count])
    (images, labels), (test, truth) = sets["train"], sets["test"]
    figures: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        teacher = create_model("birealnet18_025_real", in_channels=1, seed=seed)
        teach(teacher, images, labels, seed)
        figures.setdefault("teacher", []).append(accuracy(teacher, test, truth))
        torch.manual_seed(seed)
        plain = inject(teacher, AT, images[:2], CHANNELS, width=16)
        students = {}
        for name, features in (("HND", ()), ("GHND", LATER)):
            student = inject(teacher, AT, images[:2], CHANNELS, width=16)
            student.load_state_dict(plain.state_dict())
            distil_head(student, teacher, batches(images, seed), AT, features=features, epochs=EPOCHS)
            figures.setdefault(name, []).append(accuracy(student, test, truth))
            students[name] = student
        parts = cut(students["GHND"], images[:2], f"{AT}.encoder")
        figures.setdefault("GHND, 8 bits", []).append(
            accuracy(lambda x, p=parts: p.tail(torch.from_numpy(decode(encode(p.head(x).numpy())))), test, truth)
        )
        area, dropped = filter_area(teacher, images, test, seed)
        figures.setdefault("filter: area under the curve", []).append(area)
        figures.setdefault("filter: noise not sent at recall 0.99", []).append(dropped)
        note(f"seed {seed}: { {key: round(values[-1], 3) for key, values in figures.items()} }")
    link = over_the_link(teacher, students["GHND"], test[:15])
    rows: dict[str, list[str]] = {}
    for name, values in figures.items():
        difference = paired(values, figures["teacher"]) if "HND" in name else ""
        rows[name] = [shown(values, 100), difference, "", "", ""]
    for rate, row in link.items():
        cells = [f"{1e3 * row[way]:.1f}" for way in ("local", "remote", "split")]
        rows[f"link of {float(rate) / 1e3:g} KB/s"] = ["", "", *cells]
    one = next(iter(link.values()))
    summary = (
        f"Fashion-MNIST at {SIDE} px, {arguments.seeds} seeds. GHND with 8 bits is "
        f"{paired(figures['GHND, 8 bits'], figures['teacher'])} points from the teacher; GHND against HND "
        f"{paired(figures['GHND'], figures['HND'])}. An image is {one['remote bytes']:.0f} bytes raw, "
        f"{one['split bytes']:.0f} as the bottleneck. Below, mean milliseconds for an answer over a shaped loopback "
        f"socket (5 ms each way), the device made {DEVICE} times slower than the server by waiting."
    )
    write_json(
        RESULT,
        {
            "summary": summary,
            "columns": ["%", "points against the teacher", "local, ms", "remote, ms", "split, ms"],
            "rows": rows,
            "figures": figures,
            "link": link,
            "settings": {"channels": CHANNELS, "epochs": EPOCHS, "device": DEVICE, "seeds": arguments.seeds},
            **provenance(time.monotonic() - start),
        },
    )


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    main()
