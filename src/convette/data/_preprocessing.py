"""What happens to pixels between the stored uint8 image and the network's input, and loading one image file for it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from convette._typing import ImageBytes, Images
from convette.errors import DataError, UsageError, did_you_mean

_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
_FIELDS = ("channels", "height", "width", "mean", "std", "interpolation")


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and normalisation of a network's input: ``y = (x / 255 - mean) / std``, per channel.

    `mean` and `std` are on the scale 0..1. Images of another size are scaled to cover ``height x width`` (antialiased)
    and cropped at the centre. Raises `UsageError` where a value cannot be right.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UsageError(f"preprocessing: channels is {self.channels}, expected 1 (grey) or 3 (RGB).")
        if not (0 < self.height <= 8192 and 0 < self.width <= 8192):
            raise UsageError(f"preprocessing: size {self.height}x{self.width} is not within 1..8192.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UsageError(f"preprocessing: {name} has {len(values)} values for {self.channels} channels.")
            if not all(math.isfinite(value) for value in values):
                raise UsageError(f"preprocessing: {name} {values} is not finite.")
        if min(self.std) <= 0:
            raise UsageError(f"preprocessing: std {self.std} must be above 0.")
        if self.interpolation not in _INTERPOLATIONS:
            hint = did_you_mean(self.interpolation, _INTERPOLATIONS)
            raise UsageError(f"preprocessing: unknown interpolation {self.interpolation!r}.{hint}")

    def __call__(self, images: ImageBytes) -> Float[Tensor, "n c height width"]:
        """Return the network's input for uint8 images, float32 on their device; resizes where the size differs."""
        return self.normalize(self.to_unit(images))

    def to_unit(self, images: ImageBytes) -> Float[Tensor, "n c height width"]:
        """Return uint8 images as float32 in 0..1 at this size (where augmentation works)."""
        if images.shape[1] != self.channels:
            raise UsageError(
                f"images have {images.shape[1]} channels, the network expects {self.channels}: "
                f"load the data with channels={self.channels}."
            )
        if images.shape[-2:] != (self.height, self.width):
            images = _cover(images, self.height, self.width, self.interpolation)
        return images.to(torch.float32).div_(255)

    def normalize(self, images: Images) -> Images:
        """Return ``(images - mean) / std`` for float images in 0..1."""
        mean = images.new_tensor(self.mean).view(-1, 1, 1)
        std = images.new_tensor(self.std).view(-1, 1, 1)
        return (images - mean) / std

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of plain JSON values."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Preprocessing":
        """Rebuild from `to_json`; raises `UsageError` naming an unknown, missing or mistyped field."""
        unknown = [key for key in value if key not in _FIELDS]
        if unknown:
            raise UsageError(f"preprocessing: unknown field {unknown[0]!r}.{did_you_mean(unknown[0], _FIELDS)}")
        missing = [key for key in _FIELDS[:-1] if key not in value]
        if missing:
            raise UsageError(f"preprocessing: field {missing[0]!r} is missing.")
        for key in ("channels", "height", "width"):
            if type(value[key]) is not int:
                raise UsageError(f"preprocessing: {key} is {value[key]!r}, expected an integer.")
        for key in ("mean", "std"):
            numbers = value[key]
            if not isinstance(numbers, list | tuple) or not all(type(number) in (int, float) for number in numbers):
                raise UsageError(f"preprocessing: {key} is {numbers!r}, expected a list of numbers.")
        return Preprocessing(
            value["channels"],
            value["height"],
            value["width"],
            tuple(float(number) for number in value["mean"]),
            tuple(float(number) for number in value["std"]),
            str(value.get("interpolation", "bilinear")),
        )


def load_image(path: Path | str, preprocessing: Preprocessing) -> ImageBytes:
    """Load one image file as uint8 ``1 c h w`` of the size and channels that `preprocessing` says.

    Decoded as the training images were: scaled to cover the size, cropped at the centre, transparency over white.
    Raises `DataError` for a file that is missing, damaged, no image, or a decompression bomb.
    """
    from convette.data._decode import Frame, UnreadableImage, decode_file

    size = preprocessing
    frame = Frame(size.channels, size.height, size.width, size.interpolation)
    try:
        pixels = decode_file(Path(path), frame)
    except UnreadableImage as error:
        raise DataError(f"{path}: {error}.") from error
    return torch.tensor(pixels)[None]


def _cover(images: ImageBytes, height: int, width: int, interpolation: str) -> UInt8[Tensor, "n c height width"]:
    rows, columns = images.shape[-2:]
    scale = max(height / rows, width / columns)
    # The side that sets the scale fits exactly; rounding must not make it fall short.
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    if interpolation == "nearest":
        scaled = F.interpolate(images.float(), size, mode="nearest-exact")
    else:
        scaled = F.interpolate(images.float(), size, mode=interpolation, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[..., top : top + height, left : left + width].round_().clamp_(0, 255).to(torch.uint8)
