"""Images as JPEG for the wire: what remote execution sends where it does not send raw bytes."""

import io

import numpy as np
import torch
from torch import Tensor

from convette.errors import DataError, UsageError

_MODES = {1: "L", 3: "RGB"}


def to_jpeg(image: Tensor, quality: int = 75) -> np.ndarray:
    """Return one image (uint8, ``c h w`` or ``1 c h w``; 1 or 3 channels) as the bytes of a JPEG file, uint8.

    `quality`: 1 to 95, as Pillow counts. Raises `UsageError` for another quality or another kind of image.
    """
    from PIL import Image

    if not 1 <= quality <= 95:
        raise UsageError(f"a JPEG quality of {quality}: 1 to 95 can be.")
    pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
    if pixels.ndim != 3 or len(pixels) not in _MODES or pixels.dtype != torch.uint8:
        raise UsageError(
            f"an image of {tuple(image.shape)}, {image.dtype}, cannot be a JPEG: one of 1 or 3 channels of bytes can."
        )
    array = pixels.permute(1, 2, 0).numpy()
    with io.BytesIO() as file:
        Image.fromarray(array[..., 0] if len(pixels) == 1 else array).save(file, "JPEG", quality=quality)
        return np.frombuffer(file.getvalue(), np.uint8).copy()


def from_jpeg(data: np.ndarray | Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the image in the bytes of a JPEG file as uint8 ``1 c h w``.

    `shape`: channels, rows and columns it must have; they are compared with the header before a pixel is decoded.
    Raises `DataError` for anything else.
    """
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(np.asarray(data, np.uint8).tobytes()), formats=["JPEG"]) as file:
            if file.size != (width, height) or file.mode != _MODES.get(channels):
                found = f"{file.width}x{file.height} pixels of mode {file.mode}"
                raise DataError(f"the JPEG image has {found}, expected {width}x{height} and {channels} channels.")
            pixels = np.array(file)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the message is no whole JPEG image: {error}.") from error
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)[None].contiguous()
