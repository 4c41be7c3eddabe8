"""Deciding by looking: the classes that are there, the shape the images are brought to."""

import numpy as np
from jaxtyping import Int32

from convette.data._decode import Frame
from convette.data._examples import NO_LABEL, RawData
from convette.errors import DataError

# Uniform images up to this side stay as they are; larger or mixed ones become squares of at most this side.
LARGEST_SIDE = 224


def check_classes(raw: RawData, source: str) -> None:
    """Raise `DataError` where there are fewer than two classes or one without training images."""
    names = raw.class_names
    if len(names) < 2:
        raise DataError(f"{source}: has only one class ({', '.join(names)}); a classifier needs at least two.")
    if len(set(names)) < len(names):
        double = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{source}: two classes are named {double!r}; rename one.")
    labels = raw.splits["train"].labels
    counts = np.bincount(labels[labels != NO_LABEL], minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise DataError(
            f"{source}: class {empty[0]!r} has no training images ({len(empty)} of {len(names)} classes are empty); "
            "add images or remove the class."
        )


def choose_frame(
    headers: Int32[np.ndarray, "n 3"], image_size: int | None, channels: int | None, source: str
) -> tuple[Frame, list[str]]:
    """Return the shape for all images, from the headers of the training images, and notes on what was decided.

    `image_size` gives a square. Images of one size up to 224 a side keep it; larger or mixed ones become squares of the
    median shorter side, at most 224, above 32 rounded down to a multiple of 8. Grey stays one channel if all are grey.
    """
    headers = headers[headers[:, 0] > 0]
    if not len(headers):
        raise DataError(f"{source}: no training image can be read.")
    notes: list[str] = []
    if channels is None:
        grey = int(headers[:, 2].sum())
        channels = 1 if grey == len(headers) else 3
        if 0 < grey < len(headers):
            notes.append(f"{grey} grey images among {len(headers)} are read as RGB")
    sizes = headers[:, :2]
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    uniform = bool((low == high).all())
    if image_size is not None:
        height = width = image_size
    elif uniform and high.max() <= LARGEST_SIDE:
        height, width = int(high[0]), int(high[1])
    else:
        side = min(int(np.median(sizes.min(axis=1))), LARGEST_SIDE)
        height = width = side if side <= 32 else side // 8 * 8
    if not uniform or (height, width) != (high[0], high[1]):
        found = f"of {high[1]}x{high[0]}" if uniform else f"of {low[1]}x{low[0]} to {high[1]}x{high[0]}"
        notes.append(f"images {found} are scaled to cover {width}x{height} and cropped at the centre")
    return Frame(channels, height, width), notes
