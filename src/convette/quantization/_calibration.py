"""Calibration images: taken from the training split, and refused where no ranges can be learnt from them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convette._progress import note
from convette.errors import DataError

LEAST_IMAGES = 2
FEW_IMAGES = 32


def training_images(data: Any, preprocessing: Any, count: int, seed: int) -> list[Tensor]:
    """Return `count` training images of `data` (all, if it has fewer), drawn by `seed`, preprocessed, in batches."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train), generator=generator)[:count]
    return [preprocessing(data.train.images(part)) for part in chosen.split(32)]


def checked(calibration: Iterable[Tensor | np.ndarray]) -> np.ndarray:
    """Return all calibration images as one float32 array ``n c h w``.

    Raises `DataError` for fewer than two images, values that are not finite, or images that are all the same: every
    activation would be constant and no range could be learnt.
    """
    batches = [np.asarray(batch.cpu() if isinstance(batch, Tensor) else batch, np.float32) for batch in calibration]
    images = np.concatenate(batches) if batches else np.empty((0, 1, 1, 1), np.float32)
    if len(images) < LEAST_IMAGES:
        raise DataError(
            f"calibration: {len(images)} image(s); activation ranges need at least {LEAST_IMAGES}, better 128 to 300."
        )
    bad = ~np.isfinite(images).reshape(len(images), -1).all(axis=1)
    if bad.any():
        raise DataError(f"calibration: image {int(bad.argmax())} holds values that are not finite (NaN or infinity).")
    if (images == images[:1]).all():
        raise DataError("calibration: the images are all the same, so no range can be learnt; give different ones.")
    if len(images) < FEW_IMAGES:
        note(f"calibration on only {len(images)} images: the ranges may be too narrow; 128 to 300 are usual.")
    return images
