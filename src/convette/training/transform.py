"""From a batch of bytes to what the network sees: on the device, augmented, normalised."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class BatchTransform:
    """Moves a batch to the device as bytes, augments it there in 0..1, normalises it there.

    `preprocessing` is a `convette.data.Preprocessing`; `augmentation` takes float images in 0..1 and labels and
    returns images and labels or soft targets; None: images are only preprocessed.
    """

    def __init__(
        self,
        preprocessing: Any,
        device: torch.device,
        augmentation: Augmentation | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.device = device
        self._memory_format = memory_format
        self._preprocessing = preprocessing
        self._augmentation = augmentation

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images (float, normalised) and targets (labels or soft targets) on the device."""
        labels = batch.labels.to(self.device, non_blocking=True)
        images = self._preprocessing.to_unit(batch.images.to(self.device, non_blocking=True))
        if self._augmentation is not None:
            images, labels = self._augmentation(images, labels)
        return self._preprocessing.normalize(images).contiguous(memory_format=self._memory_format), labels
