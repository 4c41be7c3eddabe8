"""Augmentation of whole batches on the device, every image with parameters of its own."""

from convette.training.augmentation._build import AUGMENTATIONS, Augmentation, build_augmentation
from convette.training.augmentation._choose import choose_augmentation

__all__ = ["AUGMENTATIONS", "Augmentation", "build_augmentation", "choose_augmentation"]
