"""How far explanations move when a network is changed: rank correlation and box overlap, image by image."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images
from convette.errors import UsageError
from convette.explain._explanation import Explanation
from convette.explain.eigen_cam import EigenCAM
from convette.explain.grad_cam import GradCAM

Method = Literal["grad_cam", "eigen_cam"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Drift:
    """How much the maps of two networks agree on the same images.

    Attributes:
        method: "grad_cam" (for the class the first network predicts) or "eigen_cam".
        images: how many.
        correlation: mean rank correlation of the maps, 1: same order of all pixels, 0: none.
        low, high: 95 % interval of that mean.
        box_overlap: mean intersection over union of the boxes at 20 % of the maximum.
        layer_before, layer_after: the layers explained.
        correlations: image by image.
    """

    method: str
    images: int
    correlation: float
    low: float
    high: float
    box_overlap: float
    layer_before: str
    layer_after: str
    correlations: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a JSON-ready dict."""
        return asdict(self) | {"correlations": list(self.correlations)}


def explanation_drift(
    before: nn.Module, after: nn.Module, images: Images, *, method: Method = "grad_cam", batch_size: int = 64
) -> Drift:
    """Explain `images` with both networks and compare the maps.

    The layer is chosen in `before`; `after` is explained at the layer of that name where it has one, else at its own
    choice. Grad-CAM asks both for the class that `before` predicts.

    Args:
        before: the network before a change (pruning, folding, quantisation).
        after: the same afterwards.
        images: as the networks take them, at least one.
        method: the explainer.
        batch_size: images a run.

    Raises:
        UsageError: no images, or an unknown method.
    """
    if len(images) == 0:
        raise UsageError("explanation drift needs at least one image.")
    explainers = {"grad_cam": GradCAM, "eigen_cam": EigenCAM}
    if method not in explainers:
        raise UsageError(f"explanation method {method!r}: {' or '.join(explainers)}.")
    first = explainers[method](before)
    layers = ("", "")
    correlations: list[float] = []
    overlaps: list[float] = []
    for batch in images.split(batch_size):
        a = first.explain(batch)
        b = _explain_after(after, a, batch, method)
        first.layer = a.layer  # the same for all batches
        layers = (a.layer, b.layer)
        correlations += rank_correlation(a.maps, b.maps).tolist()
        overlaps += [box_overlap(box_of(x), box_of(y)) for x, y in zip(a.maps, b.maps, strict=True)]
    values = torch.tensor(correlations, dtype=torch.float64)
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Drift(
        method=method,
        images=len(images),
        correlation=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        box_overlap=sum(overlaps) / len(overlaps),
        layer_before=layers[0],
        layer_after=layers[1],
        correlations=tuple(correlations),
    )


def _explain_after(after: nn.Module, a: Explanation, batch: Tensor, method: str) -> Explanation:
    names = {name for name, _ in after.named_modules()}
    layer = a.layer if a.layer in names else None
    if method == "grad_cam":
        return GradCAM(after, layer).explain(batch, a.classes)
    return EigenCAM(after, layer).explain(batch)


def rank_correlation(map_a: Float[Tensor, "*n h w"], map_b: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Return Spearman's correlation of the pixels of two maps, map by map; ties share their mean rank.

    -1 to 1. Two constant maps agree (1); a constant one and another do not (0).
    """
    from scipy.stats import rankdata

    ranks = []
    for maps in (map_a, map_b):
        flat = maps.detach().cpu().flatten(-2).double().numpy()
        ranked = torch.from_numpy(rankdata(flat, axis=-1))
        ranks.append(ranked - ranked.mean(-1, keepdim=True))
    a, b = ranks
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    both_constant = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
    correlation = (a * b).sum(-1) / torch.where(lengths > 0, lengths, 1.0)
    return torch.where(both_constant, 1.0, correlation).clamp(-1, 1).float()


def box_of(map: Float[Tensor, "h w"], threshold: float = 0.2) -> Box | None:
    """Return the box (top, left, bottom, right; the last two exclusive) of the largest area above a threshold.

    `threshold` is a share of the maximum. None for a map without anything positive.
    """
    import numpy as np
    from scipy.ndimage import find_objects, label

    values = map.detach().cpu().numpy()
    if not values.max() > 0:
        return None
    areas, count = label(values >= threshold * values.max())  # pyright: ignore[reportGeneralTypeIssues]
    sizes = np.bincount(areas.ravel(), minlength=count + 1)[1:]
    rows, columns = find_objects(areas)[int(sizes.argmax())]
    return rows.start, columns.start, rows.stop, columns.stop


def box_overlap(a: Box | None, b: Box | None) -> float:
    """Return the intersection over union of two boxes; 1 for two that are None, 0 for one."""
    if a is None or b is None:
        return float(a is b)
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    inside = height * width
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inside / (sum(areas) - inside)
