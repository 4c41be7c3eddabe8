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
from convette.pipeline.edge_filter import FilteringHead, TrainedFilter, class_number, train_filter
from convette.pipeline.inspect import check_network, input_of
from convette.runtime import export
from convette.runtime.edge_split import (
    EdgeClient,
    EdgeServer,
    ShapedLink,
    cut,
    decode,
    distil_head,
    encode,
    from_jpeg,
    inject,
    to_jpeg,
)
from convette.runtime.edge_split.bottleneck import check_features

TIMED_IMAGES, MOST_SECONDS = 20, 20.0  # images timed each way; fewer where the link would take longer
BATCH = 16
LENGTH_BYTES = 4  # what a message's length takes on the wire
FILTERED = "split, filter"


@dataclass(frozen=True)
class Way:
    """A way to answer: accuracy on the test split and the share of it `answered_here`, without the link (0..1); bytes
    and seconds an image, means (seconds over the timed images, those answered here by their share)."""

    name: str
    accuracy: float
    answered_here: float
    bytes_sent: float
    seconds: float


@dataclass(frozen=True)
class SplitOutcome:
    """What a split came to: accuracies on the test split (0..1), bytes an image, seconds an answer by each way.

    `ways`: the same, way by way, the filter and JPEG with them where they were asked for. `filter_threshold`: images
    that score less are not sent. `fallbacks`: answers of remote and split execution that the network had to give by
    itself because the link failed.
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
    ways: tuple[Way, ...]
    filter_threshold: float | None = None
    files: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Return the outcome as people read it."""
        widest = max(len(way.name) for way in self.ways)
        lines = [
            f"Split behind {self.at}.encoder: the device computes {self.head_macs:,} of {self.whole_macs:,} MACs.",
            f"{'':{widest}}  {'right':>8}  {'answered here':>13}  {'bytes sent':>10}  {'ms':>8}",
        ]
        for way in self.ways:
            lines.append(
                f"{way.name:{widest}}  {100 * way.accuracy:>6.2f} %  {100 * way.answered_here:>11.1f} %  "
                f"{way.bytes_sent:>10,.0f}  {1e3 * way.seconds:>8.1f}"
            )
        if self.filter_threshold is not None:
            lines.append(f"The filter keeps back what scores below {self.filter_threshold:.4g}.")
        if self.fallbacks:
            lines.append(f"{self.fallbacks} answered alone: the link failed.")
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
    filter_class: str | None = None,
    recall: float = 0.99,
    jpeg: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> SplitOutcome:
    """Put a bottleneck in the place of the stage `at` of `model`, train it on `source`, and time it over a link.

    Args:
        model: a trained network, left as it is; it is the teacher, and answers alone when the link fails.
        source: images as `convette.load_data` reads them: training images for the bottleneck, test images to judge.
        features: later stages that the bottleneck is to reproduce too (GHND); none: `at` alone (HND).
        rate, latency: bytes a second and seconds each way of the loopback link.
        filter_class: the class of images that hold nothing: a filter on what would cross learns to tell them; they are
            answered by that class and not sent. Its threshold passes the share `recall` of the other images of the
            validation split.
        jpeg: also send images whole, as JPEG of this quality (1 to 95).
        out: a folder for ``head.onnx`` and ``tail.onnx``, and ``filter.onnx`` (takes what the head gives).

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
    empty = class_number(data, filter_class, recall) if filter_class is not None else None
    if jpeg is not None:
        to_jpeg(data.test.images([0]), jpeg)
    torch.manual_seed(seed)
    student = inject(model, at, example, channels, width)

    _distil(student, model, data, shape, at, features=features, epochs=epochs, seed=seed)
    parts = cut(student, example, f"{at}.encoder")

    judge = None if empty is None else train_filter(parts.head, data, shape, empty, recall, seed=seed)
    ends = _Ends(model, parts.head, parts.tail, shape, judge, jpeg)

    seconds, sizes, failures = _timed(ends, data, rate, latency)
    if failures:
        note(f"split: the link failed: {failures[0]}")
    ways = _ways(ends, data, seconds, sizes)
    right = {way.name: way.accuracy for way in ways}
    files = []
    if out is not None:
        crossing = parts.head(example[:1])
        written = [("head", parts.head, example[:1]), ("tail", parts.tail, crossing)]
        if judge is not None:
            written.append(("filter", judge.module, crossing))
        for name, part, images in written:
            files.append(str(export(part, images, out / f"{name}.onnx")))
    return SplitOutcome(
        at=at,
        accuracy_before=right["local"],
        accuracy_after=right["split"],
        head_macs=count(parts.head, example[:1]).macs,
        whole_macs=count(model, example[:1]).macs,
        bytes_image=sizes["remote"],
        bytes_sent=sizes["split"],
        seconds={way.name: way.seconds for way in ways},
        fallbacks=len(failures),
        ways=tuple(ways),
        filter_threshold=judge.threshold if judge else None,
        files=tuple(files),
    )


@dataclass(frozen=True)
class _Ends:
    """What runs at each end of the link, on images as they are stored (uint8)."""

    model: nn.Module
    head: Any
    tail: Any
    shape: Preprocessing
    judge: TrainedFilter | None = None
    jpeg: int | None = None

    def whole(self, images: Tensor) -> Tensor:
        return self.model(self.shape(images))

    def crossing(self, images: Tensor) -> Tensor:
        return self.head(self.shape(images))

    def jpegs(self, images: Tensor) -> list[Tensor]:
        """The files of `images`, as bytes."""
        return [torch.from_numpy(to_jpeg(image, self.jpeg or 75)) for image in images]

    def of_jpeg(self, file: Tensor, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        return self.whole(from_jpeg(file, (channels, height, width)))

    @property
    def jpeg_name(self) -> str:
        return f"remote, JPEG {self.jpeg}"


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
def _ways(ends: _Ends, data: ImageData, seconds: dict[str, Any], sizes: dict[str, int]) -> list[Way]:
    """Return the ways with their accuracies on the test split, the share answered on the device and bytes sent."""
    right = dict.fromkeys(("local", "split", "filter", "jpeg"), 0)
    here = jpeg_bytes = 0
    with progress("split: accuracy", len(data.test), "image") as advance:
        for batch in data.test.batches(64):
            labels, crossing = batch.labels, ends.crossing(batch.images)
            right["local"] += int((ends.whole(batch.images).argmax(1) == labels).sum())
            # One by one, as they are sent: each has its own scale.
            received = torch.cat([torch.from_numpy(decode(encode(one.numpy()))) for one in crossing.split(1)])
            answers = ends.tail(received).argmax(1)
            right["split"] += int((answers == labels).sum())
            if ends.judge is not None:
                passed = ends.judge.passes(crossing)
                here += int((~passed).sum())
                right["filter"] += int((torch.where(passed, answers, ends.judge.empty) == labels).sum())
            if ends.jpeg is not None:
                files, shape = ends.jpegs(batch.images), batch.images.shape[1:]
                jpeg_bytes += sum(len(encode(file.numpy())) + LENGTH_BYTES for file in files)
                outputs = torch.cat([ends.of_jpeg(file, shape) for file in files])
                right["jpeg"] += int((outputs.argmax(1) == labels).sum())
            advance(len(labels))
    total = len(data.test)
    share = {name: value / total for name, value in right.items()}
    ways = [
        Way("local", share["local"], 1.0, 0.0, seconds["local"]),
        Way("remote", share["local"], 0.0, float(sizes["remote"]), seconds["remote"]),
    ]
    if ends.jpeg is not None:
        ways.append(Way(ends.jpeg_name, share["jpeg"], 0.0, jpeg_bytes / total, seconds[ends.jpeg_name]))
    ways.append(Way("split", share["split"], 0.0, float(sizes["split"]), seconds["split"]))
    if ends.judge is not None:
        kept, (of_kept, of_sent) = here / total, seconds[FILTERED]
        mean = kept * of_kept + (1 - kept) * of_sent
        ways.append(Way(FILTERED, share["filter"], kept, (1 - kept) * sizes["split"], mean))
    return ways


def _timed(
    ends: _Ends, data: ImageData, rate: float, latency: float
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Return seconds an image by each way (with the filter: of an image kept, and of one sent), bytes sent, and why the
    link failed, once for each image it did."""
    raw = data.test.images(range(min(TIMED_IMAGES, len(data.test))))
    shape = raw.shape[1:]
    # What is sent in remote execution is the image as it was stored: uint8.
    ways: dict[str, tuple[Any, Any]] = {"remote": (ends.whole, lambda x: x), "split": (ends.tail, ends.crossing)}
    if ends.jpeg is not None:
        ways[ends.jpeg_name] = (lambda file: ends.of_jpeg(file, shape), lambda x: ends.jpegs(x)[0])
    with torch.no_grad():
        sizes = {name: len(encode(sent(raw[:1]).numpy())) + LENGTH_BYTES for name, (_, sent) in ways.items()}
        expected = max(sizes.values()) / rate + 2 * latency
        patience = 30 + 3 * expected
        # Over a slow link a few images say as much.
        raw = raw[: max(2, min(len(raw), int(MOST_SECONDS / expected)))]
        ends.whole(raw[:1])
        began = time.perf_counter()
        for image in raw.split(1):
            ends.whole(image)
        seconds: dict[str, Any] = {"local": (time.perf_counter() - began) / len(raw)}
    failures: list[str] = []

    def answers(server_runs: Any, sent: Any, **filtering: Any) -> float:
        with (
            EdgeServer(server_runs, timeout=patience) as server,
            ShapedLink(server.address, rate, latency) as link,
            EdgeClient(sent, ends.whole, link.address, timeout=patience, **filtering) as client,
        ):
            found = [client(image) for image in raw.split(1)]
        failures.extend(answer.reason for answer in found if answer.where == "fallback")
        return sum(answer.seconds for answer in found) / len(found)

    for name, (server_runs, sent) in ways.items():
        seconds[name] = answers(server_runs, sent)
    if ends.judge is not None:
        # Each kind by itself: the timed images are too few to hold both in their shares.
        of_kind = []
        for threshold in (float("inf"), 0.0):
            device = FilteringHead(ends.crossing, ends.judge.module)
            of_kind.append(answers(ends.tail, device, worth=device.worth, threshold=threshold))
        seconds[FILTERED] = tuple(of_kind)
    return seconds, sizes, failures
