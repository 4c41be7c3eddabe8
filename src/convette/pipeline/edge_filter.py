"""The filter of a split network: trained on what crosses, its threshold chosen on the validation split."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from convette._progress import note, progress
from convette.data import ImageData, ImageSplit, Preprocessing
from convette.errors import UsageError, did_you_mean
from convette.runtime.edge_split import NeuralFilter, pick_threshold

EPOCHS, BATCH, LEARNING_RATE = 6, 32, 3e-3
WIDTH, LEAST_SIDE, MOST_SIDE = 16, 16, 64  # channels inside, and the side its input is pooled to


@dataclass(frozen=True)
class TrainedFilter:
    """A filter that knows the class `empty` (a number): scores below `threshold` are answered by it, and not sent."""

    module: NeuralFilter
    threshold: float
    empty: int

    def passes(self, crossing: Tensor) -> Tensor:
        """Return for each of the tensors that would cross whether it is to be sent."""
        return self.module.score(crossing) >= self.threshold


def class_number(data: ImageData, name: str, recall: float) -> int:
    """Return the number of the class `name`. Raises `UsageError` where it is none, or the recall cannot be."""
    if name not in data.class_names:
        raise UsageError(f"--filter {name!r} is no class of the images.{did_you_mean(name, data.class_names)}")
    if not 0 < recall <= 1:
        raise UsageError(f"--recall {recall:g}: a share above 0 and up to 1 is needed.")
    return list(data.class_names).index(name)


def train_filter(
    head: Any, data: ImageData, shape: Preprocessing, empty: int, recall: float, *, seed: int
) -> TrainedFilter:
    """Train a filter on what `head` gives for the training images to tell those of the class `empty` from the others.

    The threshold is the largest that still passes the share `recall` of the other images of the validation split.
    """
    with torch.no_grad():
        example = head(shape(data.train.images([0])))
    torch.manual_seed(seed)
    judge = NeuralFilter(example.shape[1], max(LEAST_SIDE, min(MOST_SIDE, example.shape[-1])), WIDTH)
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE)
    steps = EPOCHS * -(-len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with progress("split: filter", steps, "batch") as advance:
        for epoch in range(EPOCHS):
            for batch in data.train.batches(BATCH, shuffle=True, seed=seed, epoch=epoch):
                with torch.no_grad():
                    crossing = head(shape(batch.images))
                loss = F.cross_entropy(judge(crossing), (batch.labels != empty).long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance()
    judge.eval()
    scores, worth = _scores(judge, head, data.validation, shape, empty)
    threshold = pick_threshold(scores, worth, recall)
    passed, kept = (scores[worth] >= threshold).mean(), (scores[~worth] < threshold).sum()
    note(
        f"split: the filter sends {100 * passed:.1f} % of the validation images that are worth it, and keeps back "
        f"{kept} of the {(~worth).sum()} of class {data.class_names[empty]}"
    )
    return TrainedFilter(judge, threshold, empty)


@torch.no_grad()
def _scores(
    judge: NeuralFilter, head: Any, split: ImageSplit, shape: Preprocessing, empty: int
) -> tuple[np.ndarray, np.ndarray]:
    """The score of each image of `split`, and whether it is worth sending."""
    scores, worth = [], []
    with progress("split: filter's threshold", len(split), "image") as advance:
        for batch in split.batches(64):
            scores.append(judge.score(head(shape(batch.images))).numpy())
            worth.append((batch.labels != empty).numpy())
            advance(len(batch.labels))
    return np.concatenate(scores), np.concatenate(worth)


class FilteringHead:
    """The device's half: `worth` runs the head and judges what it gives, and calling it hands over that same tensor."""

    def __init__(self, head: Any, judge: NeuralFilter) -> None:
        self.head, self.judge = head, judge
        self._of: Tensor | None = None
        self._crossing: Tensor | None = None

    def worth(self, images: Tensor) -> Tensor:
        """Return the filter's scores of `images`."""
        crossing = self.head(images)
        self._of, self._crossing = images, crossing
        return self.judge.score(crossing)

    def __call__(self, images: Tensor) -> Tensor:
        """Return what crosses."""
        return self._crossing if images is self._of and self._crossing is not None else self.head(images)
