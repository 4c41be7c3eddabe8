"""A network split between a device and a server: a bottleneck trained on its images, and answers over a link."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette import data as data_room
from convette._progress import note, progress
from convette.cost import count
from convette.data import ImageData, Preprocessing
from convette.errors import UsageError
from convette.pipeline.inspect import check_network, input_of
from convette.runtime import export
from convette.runtime.edge_split import EdgeClient, EdgeServer, ShapedLink, cut, decode, distil_head, encode, inject
from convette.runtime.edge_split.bottleneck import check_features

TIMED_IMAGES, MOST_SECONDS = 20, 20.0  # images timed each way; fewer where the link would take longer
BATCH = 16
LENGTH_BYTES = 4  # what a message's length takes on the wire


@dataclass(frozen=True)
class SplitOutcome:
    """What a split came to: accuracies on the test split (0..1), bytes an image, seconds an answer by each way.

    `fallbacks`: answers of remote and split execution that the network had to give by itself because the link failed.
    """

    at: str
    accuracy_before: float
    accuracy_after: float
    head_macs: int
    whole_macs: int
    bytes_image: int
    bytes_sent: int
    seconds: dict[str, float]
    fallbacks: int
    files: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Return the outcome as people read it."""
        times = ", ".join(f"{way} {1e3 * seconds:.1f} ms" for way, seconds in self.seconds.items())
        lines = [
            f"Split behind {self.at}.encoder: {100 * self.accuracy_after:.2f} % right on the test split in 8 bits, "
            f"{100 * self.accuracy_before:.2f} % whole.",
            f"An image sends {self.bytes_sent:,} bytes, raw {self.bytes_image:,}; the device computes "
            f"{self.head_macs:,} of {self.whole_macs:,} MACs.",
            f"An answer takes: {times}"
            + (f"; {self.fallbacks} answered alone: the link failed." if self.fallbacks else "."),
        ]
        return "\n".join([*lines, *self.files])


def split_network(
    model: nn.Module,
    source: str,
    at: str,
    *,
    features: Sequence[str] = (),
    channels: int = 3,
    width: int = 16,
    epochs: int = 8,
    rate: float = 1e5,
    latency: float = 0.005,
    out: Path | None = None,
    seed: int = 0,
) -> SplitOutcome:
    """Put a bottleneck in the place of the stage `at` of `model`, train it on `source`, and time it over a link.

    Args:
        model: a trained network, left as it is; it is the teacher, and answers alone when the link fails.
        source: images as `convette.load_data` reads them: training images for the bottleneck, test images to judge.
        features: later stages that the bottleneck is to reproduce too (GHND); none: `at` alone (HND).
        rate, latency: bytes a second and seconds each way of the loopback link.
        out: a folder for ``head.onnx`` and ``tail.onnx``.

    Raises `StructureError` where no bottleneck fits at `at`, `UsageError` for values that cannot be.
    """
    if epochs < 0 or not rate > 0 or latency < 0:
        raise UsageError(
            f"split: epochs = {epochs}, rate = {rate:g}, latency = {latency:g}: 0 or more, above 0, 0 or more can be."
        )
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"split: {out} is a file; --out names a folder.")
    shape = input_of(model)
    data = data_room.load_data(source, image_size=shape.height, channels=shape.channels)  # type: ignore[arg-type]
    example = shape(data.train.images([0, 1]))
    check_network(model, "the network", example, data.num_classes)
    check_features(model, features)
    torch.manual_seed(seed)
    student = inject(model, at, example, channels, width)

    _distil(student, model, data, shape, at, features=features, epochs=epochs, seed=seed)
    parts = cut(student, example, f"{at}.encoder")

    def sent(images: Tensor) -> Tensor:
        return parts.tail(torch.from_numpy(decode(encode(parts.head(images).numpy()))))

    seconds, sizes, failures = _timed(model, parts, data, shape, rate, latency)
    if failures:
        note(f"split: the link failed: {failures[0]}")
    files = []
    if out is not None:
        crossing = parts.head(example[:1])
        for name, part, images in (("head", parts.head, example[:1]), ("tail", parts.tail, crossing)):
            files.append(str(export(part, images, out / f"{name}.onnx")))
    return SplitOutcome(
        at=at,
        accuracy_before=_accuracy(model, data, shape, "split: accuracy whole"),
        accuracy_after=_accuracy(sent, data, shape, "split: accuracy split"),
        head_macs=count(parts.head, example[:1]).macs,
        whole_macs=count(model, example[:1]).macs,
        bytes_image=sizes["remote"],
        bytes_sent=sizes["split"],
        seconds=seconds,
        fallbacks=len(failures),
        files=tuple(files),
    )


def _distil(
    student: nn.Module,
    teacher: nn.Module,
    data: ImageData,
    shape: Preprocessing,
    at: str,
    *,
    features: Sequence[str],
    epochs: int,
    seed: int,
) -> None:
    """Train the bottleneck on the training images, and say what it came to."""
    total = epochs * -(-len(data.train) // BATCH)
    with progress("split: bottleneck", total, "batch") as advance:

        def batches(epoch: int) -> Iterator[Tensor]:
            for batch in data.train.batches(BATCH, shuffle=True, seed=seed, epoch=epoch):
                yield shape(batch.images)
                advance()

        losses = distil_head(student, teacher, batches, at, features=features, epochs=epochs)
    if losses:
        note(f"split: the bottleneck's error went from {losses[0]:.3g} to {losses[-1]:.3g} in {total:,} steps")
    else:
        note("split: the bottleneck is untrained (--epochs 0): its answers are worth nothing")


@torch.no_grad()
def _accuracy(run: Any, data: ImageData, shape: Preprocessing, title: str) -> float:
    right = 0
    with progress(title, len(data.test), "image") as advance:
        for batch in data.test.batches(64):
            right += int((run(shape(batch.images)).argmax(1) == batch.labels).sum())
            advance(len(batch.labels))
    return right / len(data.test)


def _timed(
    model: nn.Module, parts: Any, data: ImageData, shape: Preprocessing, rate: float, latency: float
) -> tuple[dict[str, float], dict[str, int], list[str]]:
    """Return seconds an image by each way, bytes sent, and why the link failed, once for each image it did."""
    raw = data.test.images(range(min(TIMED_IMAGES, len(data.test))))

    def whole(images: Tensor) -> Tensor:
        return model(shape(images))

    def head(images: Tensor) -> Tensor:
        return parts.head(shape(images))

    # What is sent in remote execution is the image as it was stored: uint8.
    ways: dict[str, tuple[Any, Any]] = {"remote": (whole, lambda x: x), "split": (parts.tail, head)}
    with torch.no_grad():
        sizes = {name: len(encode(sent(raw[:1]).numpy())) + LENGTH_BYTES for name, (_, sent) in ways.items()}
        expected = max(sizes.values()) / rate + 2 * latency
        patience = 30 + 3 * expected
        # Over a slow link a few images say as much.
        raw = raw[: max(2, min(len(raw), int(MOST_SECONDS / expected)))]
        whole(raw[:1])
        began = time.perf_counter()
        for image in raw.split(1):
            whole(image)
        seconds = {"local": (time.perf_counter() - began) / len(raw)}
    failures: list[str] = []
    for name, (server_runs, sent) in ways.items():
        with (
            EdgeServer(server_runs, timeout=patience) as server,
            ShapedLink(server.address, rate, latency) as link,
            EdgeClient(sent, whole, link.address, timeout=patience) as client,
        ):
            answers = [client(image) for image in raw.split(1)]
        seconds[name] = sum(answer.seconds for answer in answers) / len(answers)
        failures += [answer.reason for answer in answers if answer.where == "fallback"]
    return seconds, sizes, failures
