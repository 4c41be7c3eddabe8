"""Classification: one class out of k for each image.

The figures are a few lines of PyTorch each: importing torchmetrics for them takes longer (two seconds) than training an
epoch on a small set. The tests hold them to torchmetrics' values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from convette._typing import Labels, Logits
from convette.errors import UsageError


@dataclass(frozen=True)
class ClassificationMetrics:
    """Figures of n classified images of k classes.

    `loss` is the mean cross-entropy in nats, without smoothing; `accuracy` and `top5` are shares (`top5` is None for
    five classes or fewer); ``confusion[i, j]`` counts the images of class i taken for class j; `calibration_error` is
    the expected calibration error over 15 bins.
    """

    loss: float
    accuracy: float
    top5: float | None
    confusion: Int64[Tensor, "k k"]
    calibration_error: float

    @property
    def class_accuracy(self) -> Float[Tensor, " k"]:
        """Share of each class's images that were recognised; NaN for a class without images."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)


class Classification:
    """Classify images into `class_names`. Targets are labels (int64 ``n``) or soft targets (float ``n k``)."""

    name = "classification"

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        if len(self.class_names) < 2:
            raise UsageError(f"classification needs at least two classes, got {len(self.class_names)}.")

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the number of outputs the network must have."""
        return len(self.class_names)

    def loss(
        self, outputs: Logits, targets: Labels | Float[Tensor, "n classes"], label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        r"""Return the mean cross-entropy, in nats.

        .. math:: -\frac{1}{n} \sum_i \sum_c \left((1 - s)\, t_{ic} + s / k\right) \log \mathrm{softmax}(z_i)_c

        with logits z, targets t (one-hot for labels) and `label_smoothing` s in 0..1. Raises `UsageError` where the
        outputs do not fit the classes.
        """
        self.check_outputs(outputs)
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # eight bits of mantissa are too few for a log of sums
        if targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def metrics(self, outputs: Logits, targets: Labels) -> ClassificationMetrics:
        """Return the figures of a whole split; raises `UsageError` for no images or a wrong number of outputs."""
        self.check_outputs(outputs)
        if not len(targets):
            raise UsageError("there are no images to compute metrics of.")
        outputs = outputs.float()
        probabilities = outputs.softmax(dim=1)
        return ClassificationMetrics(
            loss=float(F.cross_entropy(outputs, targets)),
            accuracy=top_k_accuracy(outputs, targets, 1),
            top5=top_k_accuracy(outputs, targets, 5) if self.num_classes > 5 else None,
            confusion=confusion_matrix(outputs.argmax(dim=1), targets, self.num_classes),
            calibration_error=calibration_error(probabilities, targets),
        )

    def check_outputs(self, outputs: Any) -> None:
        """Raise `UsageError` unless `outputs` are one row of logits, one for each class, for each image."""
        if not isinstance(outputs, Tensor):
            raise UsageError(
                f"the network returns a {type(outputs).__name__}; classification needs one tensor of logits, n x "
                f"{self.num_classes}."
            )
        if outputs.ndim != 2 or outputs.shape[1] != self.num_classes:
            shape = " x ".join(str(size) for size in outputs.shape)
            raise UsageError(
                f"the network's outputs are {shape}, but there are {self.num_classes} classes: expected n x "
                f"{self.num_classes}. Create the network with num_classes={self.num_classes}."
            )


def top_k_accuracy(outputs: Logits, labels: Labels, k: int) -> float:
    """Return the share of images whose class is among the `k` largest outputs, in 0..1."""
    best = outputs.argmax(dim=1, keepdim=True) if k == 1 else outputs.topk(k, dim=1).indices
    return float((best == labels[:, None]).any(dim=1).double().mean())


def confusion_matrix(predictions: Labels, labels: Labels, num_classes: int) -> Int64[Tensor, "k k"]:
    """Return counts: row = true class, column = predicted class."""
    pairs = torch.bincount(labels * num_classes + predictions, minlength=num_classes * num_classes)
    return pairs.view(num_classes, num_classes)


def calibration_error(probabilities: Float[Tensor, "n k"], labels: Labels, bins: int = 15) -> float:
    r"""Return the expected calibration error, in 0..1.

    .. math:: \sum_b \frac{n_b}{n} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    over `bins` equal bins of the confidence, the largest probability of an image. Source: arXiv 1706.04599, equation 3.
    """
    confidence, predictions = probabilities.double().max(dim=1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    excess = confidence - (predictions == labels).double()
    # The count of a bin cancels: n_b / n |mean| = |sum| / n.
    sums = torch.zeros(bins, dtype=torch.float64, device=place.device).index_add_(0, place, excess)
    return float(sums.abs().sum() / len(labels))
