"""Arrays and files as `data:` URIs, so that the report needs nothing beside itself."""

import base64
import io

import numpy as np

# Small images are enlarged to about this many pixels, in whole steps, so that each pixel stays a sharp square.
SHOWN_SIZE = 96


def data_uri(content: bytes, media_type: str) -> str:
    """Return `content` as a `data:` URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def picture(image: np.ndarray) -> str:
    """Return an image (uint8, "c h w" or "h w c", 1 or 3 channels) as a PNG `data:` URI, enlarged if small."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    shown = Image.fromarray(pixels)
    factor = max(1, SHOWN_SIZE // max(shown.size))
    if factor > 1:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")
