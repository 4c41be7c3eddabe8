"""Batched augmentation from kornia, put together by name.

Why kornia for all of them: its transforms draw parameters for every image of a batch, on any device, from PyTorch's
random stream. torchvision's v2 transforms draw once for the whole batch (flip, crop, colour, erasing, mixup, cutmix
alike). timm draws per image for erasing and mixup, but from the streams of `random` and NumPy, which
`torch.manual_seed` and a resumed run do not restore, and image by image in Python.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from convette._typing import Images, Labels
from convette.errors import UsageError, did_you_mean
from convette.training.augmentation._choose import choose_augmentation

# In the order in which they are applied, whatever the order they are named in: first where things are, then how they
# look, then what is hidden, then what is mixed.
AUGMENTATIONS = ("shift", "crop", "flip", "colour", "erasing", "mixup", "cutmix")

_SMALL_SIDE = 64

_Transform = Callable[[Tensor], Tensor]
# (images, positions) -> mixed images, position of the other image in each, share of the other in each
_Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Augmentation:
    """A chain of augmentations: ``(images, labels) -> (images, targets)``.

    Images are float in 0..1, ``n c h w``, and keep shape, type and device. Labels come back as they are, or as soft
    targets ``n k`` (rows sum to 1) when images are mixed. All parameters are drawn per image from PyTorch's CPU random
    stream, so `torch.manual_seed` decides them on every device. Made by `build_augmentation`.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        transforms: Sequence[_Transform],
        mixers: Sequence[_Mixer],
        num_classes: int,
    ) -> None:
        self.names = names
        self.num_classes = num_classes
        self._transforms = transforms
        self._mixers = mixers

    def __repr__(self) -> str:
        return f"Augmentation({', '.join(self.names)})"

    @torch.no_grad()
    def __call__(self, images: Images, labels: Labels) -> tuple[Images, Labels | Float[Tensor, "n k"]]:
        """Return augmented images and labels, or soft targets."""
        for transform in self._transforms:
            images = transform(images)
        if not self._mixers:
            return images, labels
        # Each image is mixed in one way only: where both are asked for, a coin decides for each.
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        mixed = [_mix(mixer, images, targets) for mixer in self._mixers]
        if len(mixed) == 1:
            return mixed[0]
        coin = (torch.rand(len(images)) < 0.5).to(images.device)
        (first, first_targets), (second, second_targets) = mixed
        return (
            torch.where(coin[:, None, None, None], first, second),
            torch.where(coin[:, None], first_targets, second_targets),
        )


def build_augmentation(
    names: Sequence[str],
    channels: int,
    height: int,
    width: int,
    num_classes: int,
    *,
    class_names: Sequence[str] = (),
) -> Augmentation:
    """Return the augmentation made of `names`, for images ``channels x height x width`` of `num_classes` classes.

    - ``shift``: by whole pixels up to 1/8 of the side, edges repeated.
    - ``crop``: up to 64 pixels a side, by whole pixels up to 1/8 of the side over mirrored borders; larger images: a
      part of 35 to 100 % of the area, aspect 3/4 to 4/3, scaled back.
    - ``flip``: left and right exchanged, for half the images.
    - ``colour``: brightness, contrast and saturation by up to 20 % (grey images: the first two).
    - ``erasing``: a rectangle of 2 to 20 % of the area made black, in half the images.
    - ``mixup``: ``a x + (1 - a) x'`` with another image of the batch, a uniform in 0..1 (arXiv 1710.09412, alpha = 1).
    - ``cutmix``: a rectangle from another image, its area uniform in 0..1 (arXiv 1905.04899, alpha = 1).
    - ``"auto"`` instead of names: see `choose_augmentation`, which also looks at `class_names`.

    Costs 0.5 to 6 ms each for 128 images of 3 x 32 x 32 on one core. Raises `UsageError` for an unknown name.
    """
    if isinstance(names, str):
        names = choose_augmentation(channels, height, width, class_names) if names == "auto" else (names,)
    for name in names:
        if name not in AUGMENTATIONS:
            raise UsageError(f"unknown augmentation {name!r}.{did_you_mean(name, (*AUGMENTATIONS, 'auto'))}")
    chosen = tuple(name for name in AUGMENTATIONS if name in names)
    transforms = [
        transform for name in chosen if name in _TRANSFORMS for transform in _TRANSFORMS[name](channels, height, width)
    ]
    mixers = [_MIXERS[name]() for name in chosen if name in _MIXERS]
    return Augmentation(chosen, transforms, mixers, num_classes)


def _shift(channels: int, height: int, width: int) -> list[_Transform]:
    return [_padded_crop(height, width, "replicate")]


def _crop(channels: int, height: int, width: int) -> list[_Transform]:
    if max(height, width) <= _SMALL_SIDE:
        # Mirroring needs a border smaller than the image.
        return [_padded_crop(height, width, "reflect" if min(height, width) > 1 else "replicate")]
    from kornia.augmentation import RandomResizedCrop

    # Faster by sampling than by slicing (3.0 against 3.3 ms on one core, and no loop over images on a GPU).
    return [RandomResizedCrop((height, width), scale=(0.35, 1.0), cropping_mode="resample")]


def _padded_crop(height: int, width: int, padding_mode: str) -> _Transform:
    from kornia.augmentation import RandomCrop

    # Slicing copies whole pixels exactly and is the faster one (1.6 against 2.5 ms); sampling would interpolate.
    padding = (max(1, width // 8), max(1, height // 8))
    return RandomCrop((height, width), padding=padding, padding_mode=padding_mode, cropping_mode="slice")


def _flip(channels: int, height: int, width: int) -> list[_Transform]:
    from kornia.augmentation import RandomHorizontalFlip

    return [RandomHorizontalFlip(p=0.5)]


def _colour(channels: int, height: int, width: int) -> list[_Transform]:
    from kornia.augmentation import ColorJitter, RandomBrightness, RandomContrast

    if channels != 3:
        return [RandomBrightness((0.8, 1.2), p=1.0), RandomContrast((0.8, 1.2), p=1.0)]
    # No change of hue: the way to HSV and back makes it five times as slow (10.5 against 1.9 ms).
    return [ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0, p=1.0)]


def _erasing(channels: int, height: int, width: int) -> list[_Transform]:
    from kornia.augmentation import RandomErasing

    return [RandomErasing(scale=(0.02, 0.2), ratio=(0.3, 3.3), value=0.0, p=0.5)]


def _mixup() -> _Mixer:
    from kornia.augmentation import RandomMixUpV2

    blend = RandomMixUpV2(lambda_val=(0.0, 1.0), p=1.0, data_keys=["input", "class"])

    def mix(images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, labels = blend(images, positions)
        return mixed, labels[:, 1].long(), labels[:, 2]

    return mix


def _cutmix() -> _Mixer:
    from kornia.augmentation import RandomCutMixV2

    paste = RandomCutMixV2(beta=1.0, p=1.0, data_keys=["input", "class"], use_correct_lambda=True)

    def mix(images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, labels = paste(images, positions)
        # Here kornia gives the share of the image itself.
        return mixed, labels[0, :, 1].long(), 1 - labels[0, :, 2]

    return mix


_TRANSFORMS: dict[str, Callable[[int, int, int], list[_Transform]]] = {
    "shift": _shift,
    "crop": _crop,
    "flip": _flip,
    "colour": _colour,
    "erasing": _erasing,
}
_MIXERS: dict[str, Callable[[], _Mixer]] = {"mixup": _mixup, "cutmix": _cutmix}


def _mix(mixer: _Mixer, images: Images, targets: Float[Tensor, "n k"]) -> tuple[Images, Float[Tensor, "n k"]]:
    # Given positions for labels, kornia tells which image went into which.
    mixed, other, share = mixer(images, torch.arange(len(images), device=images.device))
    share = share.to(targets.dtype)[:, None]
    return mixed, targets * (1 - share) + targets[other] * share
