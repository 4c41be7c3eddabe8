"""A network split between a device and a server: a bottleneck trained on its images, and answers over a link."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette import data as data_room
from convette._progress import note
from convette.cost import count
from convette.data import ImageData, Preprocessing
from convette.errors import UsageError
from convette.pipeline.inspect import input_of
from convette.runtime import export
from convette.runtime.edge_split import EdgeClient, EdgeServer, ShapedLink, cut, decode, distil_head, encode, inject

TIMED_IMAGES = 20


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
            f"An answer takes: {times}; {self.fallbacks} answered alone because the link failed.",
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
    epochs: int = 4,
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
    if epochs < 0:
        raise UsageError(f"split: epochs = {epochs} cannot be.")
    shape = input_of(model)
    data = data_room.load_data(source, image_size=shape.height, channels=shape.channels)  # type: ignore[arg-type]
    example = shape(data.train.images([0, 1]))
    torch.manual_seed(seed)
    student = inject(model, at, example, channels, width)

    def batches(epoch: int) -> Iterator[Tensor]:
        for batch in data.train.batches(64, shuffle=True, seed=seed, epoch=epoch):
            yield shape(batch.images)

    losses = distil_head(student, model, batches, at, features=features, epochs=epochs)
    note(
        f"split: the bottleneck's error went from {losses[0]:.3g} to {losses[-1]:.3g}" if losses else "split: untrained"
    )
    parts = cut(student, example, f"{at}.encoder")

    def sent(images: Tensor) -> Tensor:
        return parts.tail(torch.from_numpy(decode(encode(parts.head(images).numpy()))))

    seconds, sizes, fallbacks = _timed(model, parts, data, shape, rate, latency)
    files = []
    if out is not None:
        crossing = parts.head(example[:1])
        for name, part, images in (("head", parts.head, example[:1]), ("tail", parts.tail, crossing)):
            files.append(str(export(part, images, out / f"{name}.onnx")))
    return SplitOutcome(
        at=at,
        accuracy_before=_accuracy(model, data, shape),
        accuracy_after=_accuracy(sent, data, shape),
        head_macs=count(parts.head, example[:1]).macs,
        whole_macs=count(model, example[:1]).macs,
        bytes_image=sizes["remote"],
        bytes_sent=sizes["split"],
        seconds=seconds,
        fallbacks=fallbacks,
        files=tuple(files),
    )


@torch.no_grad()
def _accuracy(run: Any, data: ImageData, shape: Preprocessing) -> float:
    right = sum(int((run(shape(b.images)).argmax(1) == b.labels).sum()) for b in data.test.batches(64))
    return right / len(data.test)


def _timed(
    model: nn.Module, parts: Any, data: ImageData, shape: Preprocessing, rate: float, latency: float
) -> tuple[dict[str, float], dict[str, int], int]:
    """Return seconds an image by each way, bytes sent, and how often the link failed."""
    import time

    raw = data.test.images(range(min(TIMED_IMAGES, len(data.test))))

    def whole(images: Tensor) -> Tensor:
        return model(shape(images))

    seconds, sizes, failed = {}, {"remote": 0, "split": 0}, 0
    with torch.no_grad():
        whole(raw[:1])
        began = time.perf_counter()
        for image in raw.split(1):
            whole(image)
        seconds["local"] = (time.perf_counter() - began) / len(raw)
    # What is sent in remote execution is the image as it was stored: uint8.
    ways = {"remote": (whole, lambda x: x), "split": (parts.tail, lambda x: parts.head(shape(x)))}
    for name, (server_runs, head) in ways.items():
        with (
            EdgeServer(server_runs) as server,
            ShapedLink(server.address, rate, latency) as link,
            EdgeClient(head, whole, link.address, timeout=30) as client,
        ):
            answers = [client(image) for image in raw.split(1)]
        seconds[name] = sum(answer.seconds for answer in answers) / len(answers)
        sizes[name] = max(answer.bytes_sent for answer in answers)
        failed += sum(answer.where == "fallback" for answer in answers)
    return seconds, sizes, failed
