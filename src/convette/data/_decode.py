"""From an encoded image to uint8 pixels of one chosen shape, safely.

What is accepted: PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, AVIF, JPEG 2000 (the first frame).
Nothing that runs a program (EPS).
"""

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
# A 64-megapixel image is 192 MB decoded; anything larger in a classification set is an accident or an attack.
MAX_PIXELS = 64_000_000
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_GREY_MODES = frozenset({"1", "L", "LA", "La", "F", "I"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_ORIENTATION = 0x0112


class UnreadableImage(Exception):
    """An image that cannot be used; the text is the reason, in a few words."""


@dataclass(frozen=True)
class Frame:
    """The shape every image is brought to."""

    channels: int
    height: int
    width: int
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Header:
    """What an image says of itself before its pixels are decoded."""

    width: int
    height: int
    grey: bool


def read_header(file: BinaryIO | bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read size and colour of an encoded image without decoding it; raise `UnreadableImage` if it is none."""
    image = _open(file, max_pixels)
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    return Header(width, height, _is_grey(image))


def decode(file: BinaryIO | bytes, frame: Frame, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "c h w"]:
    """Decode an encoded image into `frame`; raise `UnreadableImage` where it is truncated, damaged or too large."""
    image = _open(file, max_pixels)
    if image.format in ("JPEG", "MPO"):
        # The decoder scales by 1/2, 1/4, 1/8 almost for free; twice the target keeps what resampling needs.
        side = 2 * max(frame.height, frame.width)
        image.draft(None, (side, side))
    try:
        image.load()
        if _orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
        return to_frame(image, frame)
    except UnreadableImage:
        raise
    except Exception as error:
        # The decoders raise almost anything on damaged bytes: OSError, SyntaxError, struct.error, EOFError ...
        raise UnreadableImage(_reason(error)) from error


def to_frame(image: Image.Image, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
    """Convert a decoded image to `frame`: grey or RGB, then scaled to cover the size and cropped at the centre."""
    pixels = np.asarray(_fit(_flatten(image, frame.channels), frame))
    return pixels[None] if frame.channels == 1 else pixels.transpose(2, 0, 1)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # older Pillow knows no AVIF


def _open(file: BinaryIO | bytes, max_pixels: int) -> Image.Image:
    if isinstance(file, bytes):
        if not file:
            raise UnreadableImage("empty file")
        file = io.BytesIO(file)
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        if file.seekable() and file.seek(0, io.SEEK_END) == 0:
            raise UnreadableImage("empty file") from error
        raise UnreadableImage("not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage("far too many pixels (decompression bomb)") from error
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error
    width, height = image.size
    # PIL's own limit is global state that others may have changed; ours is checked here, before pixels are decoded.
    if width * height > max_pixels:
        raise UnreadableImage(f"{width}x{height} pixels, over the limit of {max_pixels:,} (decompression bomb)")
    return image


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"damaged ({text[:80]})"


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.rawmode in ("RGB", None):
        colours = np.frombuffer(bytes(image.palette.palette), np.uint8)
        colours = colours[: len(colours) // 3 * 3].reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """Return the image as 8-bit grey or RGB; transparent pixels lie over white, as every viewer shows them."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(values: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):
            raise UnreadableImage(f"float pixels from {low:g} to {high:g}, expected 0..1 or 0..255")
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise UnreadableImage(f"integer pixels from {low} to {high}, expected 0..65535")
    return (values >> 8).astype(np.uint8)


def _fit(image: Image.Image, frame: Frame) -> Image.Image:
    width, height = image.size
    if (width, height) == (frame.width, frame.height):
        return image
    scale = max(frame.width / width, frame.height / height)
    left, top = (width - frame.width / scale) / 2, (height - frame.height / scale) / 2
    box = (max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height))
    return image.resize((frame.width, frame.height), INTERPOLATIONS[frame.interpolation], box=box)


def decode_file(path: Path, frame: Frame, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "c h w"]:
    """Decode one image file; a file that cannot be opened is an `UnreadableImage` too."""
    try:
        with path.open("rb") as file:
            return decode(file, frame, max_pixels)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
