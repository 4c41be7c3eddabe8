"""Mean and standard deviation of a split's channels, from exact histograms of the bytes."""

import torch

from convette._progress import progress
from convette.data._splits import ImageSplit

_CHUNK = 512


def channel_statistics(split: ImageSplit, limit: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per-channel mean and std on the scale 0..1, in one pass over the uint8 pixels.

    `limit` takes so many evenly spaced images only. Exact: 256 counts a channel hold all that the two need, so no float
    copy is made. The std of a channel that never varies is given as 1/255, which keeps the division finite.
    """
    step = 1 if limit is None else max(1, len(split) // limit)
    indices = torch.arange(0, len(split), step)
    histogram: torch.Tensor | None = None
    with progress("channel statistics", len(indices), "image") as advance:
        for batch in split.read(list(indices.split(_CHUNK))):
            channels = batch.images.unbind(dim=1)
            counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels])
            histogram = counts if histogram is None else histogram + counts
            advance(len(batch))
    assert histogram is not None
    weights = histogram.double() / histogram.sum(dim=1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ levels
    deviation = (weights * (levels - mean[:, None]).square()).sum(dim=1).sqrt().clamp_min(1 / 255)
    return tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in deviation.tolist())
