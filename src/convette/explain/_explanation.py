"""What an explainer returns besides the picture: layer, class, score, and how far to trust it."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# Maps of different images that agree more than this on average say more about the network than about the images.
_SAME = 0.95


class ExplanationWarning(UserWarning):
    """The map can be computed but says less than it seems to."""


@dataclass(frozen=True)
class Explanation:
    """Maps of a batch of images, and what they mean.

    Attributes:
        method: "grad_cam" or "eigen_cam".
        layer: the module whose output is explained.
        reason: why that one.
        maps: 0 to 1 in each image (0: least, 1: most), at the images' resolution.
        raw: the maps before normalisation, at the layer's resolution.
        classes: the class explained, for each image; None where the method knows no classes.
        scores: the network's output for that class; None likewise.
        share: part of the features' energy that the map carries, 0 to 1 (Eigen-CAM).
        gap: first over second singular value (Eigen-CAM); near 1 the map is arbitrary.
        similarity: mean correlation between the maps of different images; None for fewer than two.
    """

    method: str
    layer: str
    reason: str
    maps: Float[Tensor, "n *m h w"]
    raw: Float[Tensor, "n *m i j"]
    classes: Int64[Tensor, " n"] | None = None
    scores: Float[Tensor, " n"] | None = None
    share: Float[Tensor, "n *m"] | None = None
    gap: Float[Tensor, " n"] | None = None
    similarity: float | None = None


def normalise(maps: Float[Tensor, "*n i j"]) -> Float[Tensor, "*n i j"]:
    """Keep what is positive and scale each map to 0..1; a constant map becomes 0."""
    maps = maps.clamp_min(0)
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def enlarge(maps: Float[Tensor, "n *m i j"], size: tuple[int, int]) -> Float[Tensor, "n *m h w"]:
    """Interpolate maps bilinearly to `size` (rows, columns)."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def similarity(maps: Float[Tensor, "n i j"], layer: str) -> float | None:
    """Return the mean correlation between the maps of different images, and warn if they are all but the same.

    At most 64 images are compared. Maps that are constant, or too coarse to differ much, are left out.
    """
    rows = maps[:64].flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    lengths = rows.norm(dim=1)
    rows = rows[lengths > 0] / lengths[lengths > 0, None]
    count = len(rows)
    if count < 2:
        return None
    mean = float(((rows @ rows.T).sum() - count) / (count * (count - 1)))
    if mean > _SAME and maps.shape[-2] * maps.shape[-1] >= 9:
        warnings.warn(
            f"the maps of {count} different images at layer {layer!r} are nearly the same (mean correlation"
            f" {mean:.2f}): they show the network, not the images. Choose an earlier layer.",
            ExplanationWarning,
            stacklevel=4,
        )
    return mean
