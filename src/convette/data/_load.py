"""`load_data`: a source by name, looked at, decoded or streamed, split, described."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from convette.data._collect import decode_all, inspect
from convette.data._decode import Frame
from convette.data._examples import BadImage, RawData, too_many_bad
from convette.data._look import check_classes, choose_frame
from convette.data._partition import carve
from convette.data._preprocessing import Preprocessing
from convette.data._splits import ImageSplit, MemorySplit, StreamedSplit
from convette.data._statistics import channel_statistics
from convette.data.sources import read_source
from convette.errors import DataError, UsageError

MEMORY_LIMIT = 4 * 1024**3
# Of a streamed set so many images (evenly spaced) give mean and std; a pass over all could take hours.
STATISTICS_LIMIT = 4096


@dataclass(frozen=True)
class ImageData:
    """A labelled image set, ready to train on: three splits of one shape, and what was found by looking.

    `bad` are the images left out, `notes` what was decided without being asked, `fingerprint` a hash that tells two
    sets (or two divisions of one) apart.
    """

    source: str
    class_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    preprocessing: Preprocessing
    bad: tuple[BadImage, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def with_preprocessing(
        self, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> "ImageData":
        """Return the same data, normalised by another mean and std (scale 0..1; one value serves all channels)."""
        channels = self.preprocessing.channels
        changed = dataclasses.replace(
            self.preprocessing,
            mean=self.preprocessing.mean if mean is None else _per_channel(mean, channels),
            std=self.preprocessing.std if std is None else _per_channel(std, channels),
        )
        return dataclasses.replace(self, preprocessing=changed)


def load_data(
    source: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_bad: float = 0.01,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int | None = None,
) -> ImageData:
    """Load a labelled image set by name.

    `source` is ``digits``, ``folder:PATH``, ``parquet:PATH``, ``hub:NAME`` or ``torchvision:NAME``. Splits that exist
    are kept; missing ones are carved out of the training images, stratified by class, by `seed`: first the test split
    (`test_fraction` of them), then the validation split (`validation_fraction` of them).

    Size: `image_size` gives a square. Otherwise training images of one size up to 224 a side stay as they are; larger
    or mixed ones become squares of the median shorter side (at most 224, above 32 rounded down to a multiple of 8),
    with a note. Images of other sizes are scaled to cover that and cropped at the centre. Channels: 1 if all training
    images are grey, else 3. `mean` and `std` (scale 0..1) default to those of the training split; for streamed data
    those of 4,096 images of it.

    Images that cannot be used (empty, truncated, no image, over 64 million pixels, no label) are left out and listed in
    `bad`. Decoded images of up to `memory_limit` bytes (4 GiB) are kept in memory, larger sets are streamed by
    `workers` processes (None: one a core, at most 8), in the same order.

    Raises `UsageError` for a source or option that cannot be, `DataError` for data that cannot be used or more than
    `max_bad` (a share, 0.01 = 1 %) bad images.
    """
    _check_options(image_size, channels, validation_fraction, test_fraction, seed, max_bad)
    raw = read_source(source)
    check_classes(raw, source)
    total = sum(len(examples) for examples in raw.splits.values())
    seen = {name: inspect(examples, name) for name, examples in raw.splits.items()}
    bad = {name: found for name, (_, found) in seen.items()}
    too_many_bad(_listed(bad), total, max_bad)
    frame, notes = choose_frame(seen["train"][0], image_size, channels, source)

    pixels: dict[str, torch.Tensor] | None = None
    if frame.channels * frame.height * frame.width * total <= memory_limit:
        pixels = _decoded(raw, bad, frame)
        too_many_bad(_listed(bad), total, max_bad)
    rows = _divide(raw, bad, validation_fraction, test_fraction, seed, source)
    if pixels is None:
        workers = min(_cores(), 8) if workers is None else workers
        splits = _streamed(raw, rows, frame, workers, max_bad)
        notes.append(f"{total} images are more than {memory_limit / 1024**3:.3g} GiB decoded: streamed")
    else:
        splits = _in_memory(raw, rows, pixels)
    notes += _missing(splits, raw.class_names)
    left_out = _listed(bad)
    if left_out:
        notes.append(f"{len(left_out)} of {total} images left out, the first: {left_out[0].name}: {left_out[0].reason}")
    return ImageData(
        source=source,
        class_names=raw.class_names,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        preprocessing=_preprocessing(splits["train"], frame, mean, std),
        bad=tuple(left_out),
        notes=(*raw.notes, *notes),
        fingerprint=_fingerprint(raw, rows, frame, pixels),
    )


def _check_options(
    image_size: int | None,
    channels: int | None,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    max_bad: float,
) -> None:
    if image_size is not None and not 1 <= image_size <= 4096:
        raise UsageError(f"image_size is {image_size}, expected 1 to 4096 pixels.")
    if channels not in (None, 1, 3):
        raise UsageError(f"channels is {channels}, expected 1 (grey) or 3 (RGB).")
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is {value}, expected a share between 0 and 1 (such as 0.1).")
    if validation_fraction + test_fraction >= 1:
        raise UsageError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train on; "
            "together they must stay below 1."
        )
    if not 0 <= max_bad <= 1:
        raise UsageError(f"max_bad is {max_bad}, expected a share between 0 and 1 (0.01 allows 1 %).")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}, expected 0 to 2^63 - 1.")


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    return values * channels if len(values) == 1 else values


def _missing(splits: dict[str, ImageSplit], class_names: tuple[str, ...]) -> list[str]:
    notes = []
    for name in ("validation", "test"):
        absent = [class_names[label] for label in torch.nonzero(splits[name].class_counts == 0).flatten().tolist()]
        if absent:
            notes.append(f"the {name} split has no image of {len(absent)} classes, such as {absent[0]!r}")
    return notes


def _cores() -> int:
    # What this process may use, which in a container is less than the machine has; not every system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listed(bad: dict[str, dict[int, BadImage]]) -> list[BadImage]:
    return [item for found in bad.values() for item in found.values()]


def _decoded(raw: RawData, bad: dict[str, dict[int, BadImage]], frame: Frame) -> dict[str, torch.Tensor]:
    """Return all images of each split; those that fail are added to `bad` and left black."""
    pixels = {}
    for name, examples in raw.splits.items():
        pixels[name], failures = decode_all(examples, name, frame, set(bad[name]))
        bad[name] |= failures
    return pixels


def _preprocessing(
    split: ImageSplit, frame: Frame, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocessing:
    limit = STATISTICS_LIMIT if isinstance(split, StreamedSplit) else None
    found_mean, found_std = channel_statistics(split, limit=limit)
    return Preprocessing(
        frame.channels,
        frame.height,
        frame.width,
        found_mean if mean is None else _per_channel(mean, frame.channels),
        found_std if std is None else _per_channel(std, frame.channels),
        frame.interpolation,
    )


def _divide(
    raw: RawData, bad: dict[str, dict[int, BadImage]], validation: float, test: float, seed: int, source: str
) -> dict[str, tuple[str, np.ndarray]]:
    """Return for each split the source's split it comes from and the rows of it, bad ones left out."""
    kept: dict[str, np.ndarray] = {}
    for name, examples in raw.splits.items():
        good = np.ones(len(examples), dtype=bool)
        good[list(bad[name])] = False
        kept[name] = np.flatnonzero(good)
    labels = raw.splits["train"].labels
    train = kept["train"]
    lost = set(range(len(raw.class_names))) - set(labels[train].tolist())
    if lost:
        raise DataError(f"{source}: class {raw.class_names[min(lost)]!r} has no training image that can be read.")
    total = len(train)
    carved: dict[str, tuple[str, np.ndarray]] = {}
    for name, fraction, stream in (("test", test, 1), ("validation", validation, 2)):
        if name in kept:
            if not len(kept[name]):
                raise DataError(f"{source}: the {name} split holds no image that can be read; add some or remove it.")
            carved[name] = (name, kept[name])
            continue
        part, rest = carve(labels[train], max(1, round(fraction * total)), seed, stream)
        if not len(part):
            raise DataError(
                f"{source}: {total} training images are too few to carve a {name} split out of them; "
                "give more images a class, or splits of your own."
            )
        carved[name] = ("train", train[part])
        train = train[rest]
    return {"train": ("train", train), **carved}


def _in_memory(
    raw: RawData, rows: dict[str, tuple[str, np.ndarray]], pixels: dict[str, torch.Tensor]
) -> dict[str, ImageSplit]:
    return {
        name: MemorySplit(
            name,
            pixels[origin],
            torch.from_numpy(raw.splits[origin].labels[chosen]),
            len(raw.class_names),
            torch.from_numpy(chosen),
        )
        for name, (origin, chosen) in rows.items()
    }


def _streamed(
    raw: RawData, rows: dict[str, tuple[str, np.ndarray]], frame: Frame, workers: int, max_bad: float
) -> dict[str, ImageSplit]:
    return {
        name: StreamedSplit(
            name,
            raw.splits[origin],
            torch.from_numpy(chosen),
            len(raw.class_names),
            frame,
            workers=workers,
            max_bad=max_bad,
        )
        for name, (origin, chosen) in rows.items()
    }


def _fingerprint(
    raw: RawData,
    rows: dict[str, tuple[str, np.ndarray]],
    frame: Frame,
    pixels: dict[str, torch.Tensor] | None,
) -> str:
    digest = hashlib.sha256(repr((raw.class_names, frame)).encode())
    for name, examples in sorted(raw.splits.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(examples.labels).data)
        if pixels is None:
            examples.update(digest)
        else:
            digest.update(pixels[name].numpy().data)
    for name, (_, chosen) in sorted(rows.items()):
        digest.update(name.encode())
        digest.update(chosen.data)
    return digest.hexdigest()[:16]
