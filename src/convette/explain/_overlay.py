"""A heat map over its image."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from convette.errors import UsageError

# Dark violet to pale yellow, growing lighter all the way: readable in grey and by the colour-blind.
_COLOURS = ((20, 10, 60), (95, 20, 125), (185, 50, 110), (240, 110, 60), (252, 185, 45), (250, 250, 160))


def heat(values: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """Return the colours (0..255) of values in 0..1."""
    table = values.new_tensor(_COLOURS)
    place = values.clamp(0, 1) * (len(_COLOURS) - 1)
    low = place.floor().long().clamp_max(len(_COLOURS) - 2)
    part = (place - low)[..., None]
    return (table[low] * (1 - part) + table[low + 1] * part).permute(2, 0, 1)


def overlay(
    image: Shaped[Tensor, "c h w"], map: Float[Tensor, "i j"], *, strength: float = 0.65, scale: int = 1
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Return `image` with `map` laid over it in colour, as (rows, columns, 3) bytes.

    Where the map is 0 the image shows through, dimmed to grey; where it is 1, `strength` of the colour covers it.

    Args:
        image: one image, grey or RGB; bytes, or floats in 0..1 (not normalised).
        map: 0 to 1; interpolated to the image's size.
        strength: share of colour where the map is 1.
        scale: whole factor to enlarge the result by, for images of a few pixels.

    Raises:
        UsageError: another number of channels, or values out of range.
    """
    if image.shape[0] not in (1, 3):
        raise UsageError(f"overlay: an image of {image.shape[0]} channels; 1 (grey) or 3 (RGB) can be shown.")
    if scale < 1 or not 0 <= strength <= 1:
        raise UsageError(f"overlay: scale {scale} must be at least 1, strength {strength} within 0..1.")
    pixels = image.detach().cpu().float() * (1.0 if image.dtype == torch.uint8 else 255.0)
    if not bool(torch.isfinite(pixels).all()) or float(pixels.min()) < -1 or float(pixels.max()) > 256:
        raise UsageError("overlay: the image must hold bytes or floats in 0..1; undo the normalisation first.")
    pixels = pixels.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    values = F.interpolate(
        map.detach().cpu().float()[None, None], size=pixels.shape[1:], mode="bilinear", align_corners=False
    )[0, 0].clamp(0, 1)
    grey = 0.5 * pixels + 0.5 * pixels.mean(0, keepdim=True)
    cover = strength * values
    mixed = grey * (1 - cover) + heat(values) * cover
    return mixed.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
