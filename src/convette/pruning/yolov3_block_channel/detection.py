"""What YOLOv3 is trained and judged by: the loss on boxes, balanced for rare classes, and mean average precision.

Boxes are rows (class, centre x, centre y, width, height) in pixels. Ports differ in anchors and ignored places; here a
box belongs to the one anchor of all nine whose shape overlaps it most, in the cell that its centre lies in, and a place
that predicts any box to more than `ignore` is no negative. The balance of classes and the focal factor are ours: the
paper's abstract only says that its loss is re-balanced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from convette.errors import UsageError
from convette.pruning.yolov3_block_channel.detector import ANCHORS, decode

Anchors = Sequence[Sequence[tuple[float | int, float | int]]]


@dataclass(frozen=True)
class YOLOLoss:
    r"""The loss of YOLOv3: boxes where they belong, objectness everywhere but near misses, classes where boxes belong.

    .. math:: L = \frac1n \Bigl( \sum_{assigned} \bigl[ (2 - \tfrac{wh}{S^2}) \bigl( BCE(\sigma(t_{xy}), \hat t_{xy}) +
        \tfrac12 \lVert t_{wh} - \hat t_{wh} \rVert^2 \bigr) + w_k\, BCE(c) \bigr] + \sum_{not\ ignored} BCE(o) \Bigr)

    for n images of side S; summed, as published. ``L(maps, boxes)`` takes the raw maps of `YOLOv3` and a tensor
    (boxes, 5) an image.

    - `size`: S in pixels. `anchors`: by map, coarse to fine, in pixels; those of YOLOv3 are for 416.
    - `ignore`: overlap with a true box from which an unassigned place counts as neither.
    - `class_weights`: of the function of that name, one a class (None: alike). `focal`: the factor
      :math:`\alpha (1 - p_t)^\gamma` on objectness, :math:`\alpha` = `alpha` for objects and 1 - `alpha` for the rest;
      off by default. These two are the balance of the paper, and go apart.

    Raises `UsageError` for boxes of another form. Costs little beside the network.
    """

    size: int
    num_classes: int
    anchors: Anchors = ANCHORS
    ignore: float = 0.5
    class_weights: Tensor | None = None
    focal: bool = False
    gamma: float = 2.0
    alpha: float = 0.5

    def __call__(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return the loss, summed over places, as a mean over images."""
        if any(one.ndim != 2 or one.shape[1] != 5 for one in boxes) or len(boxes) != len(maps[0]):
            raise UsageError("YOLOLoss: one tensor of (class, x, y, width, height) rows is needed for each image.")
        places = [self._split(raw.float()) for raw in maps]
        predicted = decode([raw.detach().float() for raw in maps], self.size, self.num_classes, self.anchors)[..., :4]
        near = torch.stack(
            [
                (box_overlap(mine, one[:, 1:]) > self.ignore).any(1) if len(one) else mine.new_zeros(len(mine)).bool()
                for mine, one in zip(predicted, boxes, strict=True)
            ]
        ).split([place[..., 0].flatten(1).shape[1] for place in places], dim=1)
        image = torch.cat([torch.full((len(one),), number) for number, one in enumerate(boxes)])
        rows = torch.cat([one.float().cpu() for one in boxes])
        levels, anchors = assigned_anchors(rows, self.anchors)
        total = maps[0].new_zeros((), dtype=torch.float32)
        for level, (place, close) in enumerate(zip(places, near, strict=True)):
            mine = levels == level
            total = total + self._level(
                level, place, close.reshape(place.shape[:-1]), image[mine], anchors[mine], rows[mine]
            )
        return total / len(boxes)

    def _level(self, level: int, place: Tensor, close: Tensor, image: Tensor, anchor: Tensor, boxes: Tensor) -> Tensor:
        """Return the loss of one map, with the boxes that belong to it."""
        rows, columns = place.shape[2], place.shape[3]
        centre = boxes[:, 1:3] / (self.size / rows)
        column, row = centre[:, 0].long().clamp(0, columns - 1), centre[:, 1].long().clamp(0, rows - 1)
        at = (image.to(place.device), anchor.to(place.device), row.to(place.device), column.to(place.device))
        objects = torch.zeros(place.shape[:-1], device=place.device)
        objects[at], ignored = 1, close.clone()
        ignored[at] = False
        found, kinds = place[at], boxes[:, 0].long()
        offset = (centre - torch.stack([column, row], dim=1)).clamp(0, 1).to(found)
        shape = (boxes[:, 3:] / torch.tensor(self.anchors[level])[anchor]).clamp_min(1e-6).log().to(found)
        box = F.binary_cross_entropy_with_logits(found[:, :2], offset, reduction="none").sum(1)
        box = box + 0.5 * (found[:, 2:4] - shape).square().sum(1)
        small = (2 - boxes[:, 3] * boxes[:, 4] / self.size**2).to(found)
        wanted = F.one_hot(kinds, self.num_classes).to(found)
        classes = F.binary_cross_entropy_with_logits(found[:, 5:], wanted, reduction="none").sum(1)
        weights = 1.0 if self.class_weights is None else self.class_weights[kinds].to(found)
        loss = (small * box + weights * classes).sum()
        return loss + self._objectness(place[..., 4], objects)[~ignored].sum()

    def _objectness(self, logits: Tensor, objects: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, objects, reduction="none")
        if not self.focal:
            return loss
        sure = torch.where(objects > 0, logits, -logits).sigmoid()
        share = torch.where(objects > 0, self.alpha, 1 - self.alpha)
        return share * (1 - sure) ** self.gamma * loss

    def _split(self, raw: Tensor) -> Tensor:
        images, _, rows, columns = raw.shape
        return raw.view(images, 3, 5 + self.num_classes, rows, columns).permute(0, 1, 3, 4, 2)


def assigned_anchors(
    boxes: Float[Tensor, "n 5"], anchors: Anchors = ANCHORS
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Return for each box the map and the anchor on it whose shape overlaps the box most (both centred alike)."""
    shapes = torch.tensor([shape for level in anchors for shape in level], dtype=boxes.dtype)
    shared = torch.minimum(boxes[:, None, 3:], shapes).prod(2)
    overlap = shared / (boxes[:, None, 3:].prod(2) + shapes.prod(1) - shared)
    best, each = overlap.argmax(1), len(anchors[0])
    return best // each, best % each


def box_overlap(first: Float[Tensor, "n 4"], second: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Return the intersections over unions of boxes (centre x, centre y, width, height)."""
    low = torch.maximum((first[:, :2] - first[:, 2:] / 2)[:, None], (second[:, :2] - second[:, 2:] / 2)[None])
    high = torch.minimum((first[:, :2] + first[:, 2:] / 2)[:, None], (second[:, :2] + second[:, 2:] / 2)[None])
    shared = (high - low).clamp_min(0).prod(2)
    union = first[:, 2:].prod(1)[:, None] + second[:, 2:].prod(1)[None] - shared
    return shared / union.clamp_min(1e-12)


@torch.no_grad()
def detections(
    maps: Sequence[Tensor],
    size: int,
    num_classes: int,
    *,
    anchors: Anchors = ANCHORS,
    confidence: float = 0.05,
    overlap: float = 0.5,
    most: int = 100,
) -> list[Tensor]:
    """Return for each image its boxes (x, y, width, height, score, class), best first, at most `most`.

    The score is objectness times class probability, at least `confidence`; of two boxes of a class that overlap by more
    than `overlap` the better stays.
    """
    from torchvision.ops import batched_nms

    result = []
    for boxes in decode(maps, size, num_classes, anchors):
        scores = boxes[:, 4:5] * boxes[:, 5:]
        place, kind = (scores >= confidence).nonzero(as_tuple=True)
        score, found = scores[place, kind], boxes[place, :4]
        corners = torch.cat([found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2], dim=1)
        stays = batched_nms(corners, score, kind, overlap)[:most]
        result.append(torch.cat([found[stays], score[stays, None], kind[stays, None].to(found)], dim=1))
    return result


def mean_average_precision(
    found: Sequence[Tensor], boxes: Sequence[Tensor], num_classes: int, overlap: float = 0.5
) -> float:
    """Return the mean over classes of the area under precision by recall, in 0..1, at one `overlap`.

    `found`: of `detections`; `boxes`: the true ones, (boxes, 5) an image. A true box is found by the best-scored
    detection of its class that overlaps it enough and has not found another; precision is made to fall with recall.
    Classes without a true box do not count; NaN where none has one.
    """
    values = []
    for kind in range(num_classes):
        truth = [one[one[:, 0] == kind][:, 1:] for one in boxes]
        total = sum(len(one) for one in truth)
        if not total:
            continue
        rows = [(float(row[4]), image, row[:4]) for image, one in enumerate(found) for row in one if row[5] == kind]
        taken = [torch.zeros(len(one), dtype=torch.bool) for one in truth]
        hits = torch.zeros(len(rows), dtype=torch.float64)
        for rank, (_, image, box) in enumerate(sorted(rows, key=lambda row: -row[0])):
            if not len(truth[image]):
                continue
            shared = box_overlap(box[None], truth[image].to(box))[0]
            shared[taken[image]] = -1
            best = int(shared.argmax())
            if shared[best] >= overlap:
                hits[rank] = 1
                taken[image][best] = True
        values.append(_area(hits, total))
    return sum(values) / len(values) if values else float("nan")


def _area(hits: Tensor, total: int) -> float:
    if not len(hits):
        return 0.0
    right = hits.cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hits).sum() / total)
