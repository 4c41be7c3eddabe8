"""One split of a data set: labelled uint8 images, in memory or streamed from their files, in the same order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from convette._progress import note
from convette._typing import ImageBytes, Labels
from convette.data._decode import Frame, UnreadableImage
from convette.data._examples import BadImage, Examples, too_many_bad
from convette.errors import UsageError

# Positions in a split.
Indices: TypeAlias = Tensor | np.ndarray | Sequence[int] | slice


@dataclass(frozen=True)
class Batch:
    """Images (uint8 ``n c h w``), their labels, and their positions in the split."""

    images: ImageBytes
    labels: Labels
    indices: Labels

    def __len__(self) -> int:
        return len(self.labels)


def epoch_order(size: int, seed: int, epoch: int) -> Labels:
    """Return a permutation of ``range(size)`` that depends on `seed` and `epoch` alone.

    Ranks 64-bit words of the Philox generator, whose raw stream is fixed across versions and machines (permutation
    functions of the libraries are not).
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return torch.from_numpy(np.argsort(words, kind="stable").astype(np.int64))


class ImageSplit(ABC):
    """Labelled images of one shape. Positions run from 0 to ``len(split) - 1``."""

    def __init__(self, name: str, labels: Labels, num_classes: int) -> None:
        self.name = name
        self.labels = labels
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_counts(self) -> Int64[Tensor, " classes"]:
        """Number of images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @abstractmethod
    def images(self, indices: Indices) -> ImageBytes:
        """Return the images at these positions as uint8 ``n c h w``."""

    @abstractmethod
    def read(self, positions: list[Tensor]) -> Iterator[Batch]:
        """Yield one batch for each tensor of positions in the split."""

    def num_batches(self, batch_size: int, *, drop_last: bool = False, world_size: int = 1) -> int:
        """Return how many batches an epoch has on each rank."""
        share = -(-len(self) // world_size)
        if share == 0:
            return 0
        return max(share // batch_size, 1) if drop_last else -(-share // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Iterate over the split once.

        The order is a function of (`seed`, `epoch`) alone. Rank r of W takes positions r, r + W, ... of it;
        every rank gets the same number of batches, for which up to W - 1 images at the start of the
        order are shown twice. `drop_last` leaves out a smaller last batch unless it is the only one. `skip` batches are
        passed over without being decoded. Raises `UsageError` for a batch size or rank that cannot be.
        """
        if batch_size < 1 or skip < 0 or epoch < 0 or seed < 0:
            raise UsageError(
                f"batches: batch_size={batch_size}, skip={skip}, epoch={epoch}, seed={seed}: "
                "the batch size must be at least 1, the others at least 0."
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"batches: rank {rank} is not within 0..{world_size - 1}.")
        order = epoch_order(len(self), seed, epoch) if shuffle else torch.arange(len(self))
        share = -(-len(order) // world_size)
        order = (
            torch.cat([order, order])[: share * world_size] if world_size <= len(order) else order.repeat(world_size)
        )
        mine = order[rank::world_size][:share]
        count = self.num_batches(batch_size, drop_last=drop_last, world_size=world_size)
        return self.read([mine[start * batch_size : (start + 1) * batch_size] for start in range(skip, count)])


class MemorySplit(ImageSplit):
    """Images decoded once and kept as uint8; splits of one source share the same pixel tensor."""

    def __init__(
        self,
        name: str,
        pixels: UInt8[Tensor, "stored c h w"],
        labels: Labels,
        num_classes: int,
        rows: Labels | None = None,
    ) -> None:
        """Keep `labels` for the images ``pixels[rows]`` (all of `pixels` if `rows` is not given)."""
        super().__init__(name, labels, num_classes)
        self.pixels = pixels
        self.rows = torch.arange(len(pixels)) if rows is None else rows

    def images(self, indices: Indices) -> ImageBytes:
        return self.pixels[self.rows[_positions(indices)].to(self.pixels.device)]

    def read(self, positions: list[Tensor]) -> Iterator[Batch]:
        for indices in positions:
            yield Batch(self.images(indices), self.labels[indices], indices)


class StreamedSplit(ImageSplit):
    """Images decoded when asked for, by worker processes; for sets that do not fit into memory.

    An image found damaged on the way is replaced by the next whole one of its class, named in `bad`, and ends the
    iteration with `DataError` once the share of bad ones passes `max_bad`.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        rows: Labels,
        num_classes: int,
        frame: Frame,
        *,
        workers: int = 2,
        max_bad: float = 0.01,
    ) -> None:
        super().__init__(name, torch.from_numpy(examples.labels)[rows], num_classes)
        self.examples = examples
        self.rows = rows
        self.frame = frame
        self.workers = workers
        self.max_bad = max_bad
        self.bad: dict[int, BadImage] = {}

    def images(self, indices: Indices) -> ImageBytes:
        batch, failures = self._decode(torch.arange(len(self))[_positions(indices)].tolist())
        self._count(failures)
        return batch.images

    def read(self, positions: list[Tensor]) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _Positions(self),
            batch_sampler=[indices.tolist() for indices in positions],
            num_workers=min(self.workers, len(positions)),
            collate_fn=_unchanged,
            # A generator of its own: the loader would otherwise draw from the training's random stream.
            generator=torch.Generator(),
        )
        for batch, failures in loader:
            self._count(failures)
            yield batch

    def _decode(self, indices: list[int]) -> tuple[Batch, list[tuple[int, BadImage]]]:
        images = torch.zeros(len(indices), self.frame.channels, self.frame.height, self.frame.width, dtype=torch.uint8)
        failures: list[tuple[int, BadImage]] = []
        shown = list(indices)
        for place, index in enumerate(indices):
            for candidate in self._candidates(index):
                row = int(self.rows[candidate])
                try:
                    images[place] = torch.from_numpy(self.examples.pixels(row, self.frame).copy())
                    shown[place] = candidate
                    break
                except UnreadableImage as error:
                    failures.append((candidate, BadImage(self.examples.name(row), self.name, str(error))))
        where = torch.tensor(shown, dtype=torch.int64)
        return Batch(images, self.labels[where], where), failures

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        label = int(self.labels[index])
        others = torch.nonzero(self.labels == label).flatten()
        after = int(torch.searchsorted(others, index, right=True))
        # Ten tries: where ten in a row are damaged the limit of bad images ends the run anyway.
        for step in range(min(10, len(others) - 1)):
            yield int(others[(after + step) % len(others)])

    def _count(self, failures: list[tuple[int, BadImage]]) -> None:
        new = {index: bad for index, bad in failures if index not in self.bad}
        self.bad.update(new)
        for bad in new.values():
            note(f"skipped {bad.name}: {bad.reason}")
        if new:
            too_many_bad(list(self.bad.values()), len(self), self.max_bad)


class _Positions(torch.utils.data.Dataset):
    """The map-style view of a streamed split that worker processes read."""

    def __init__(self, split: StreamedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> tuple[Batch, list[tuple[int, BadImage]]]:
        return self.split._decode(indices)


def _unchanged(batch: Any) -> Any:
    return batch


def _positions(indices: Indices) -> Tensor | slice:
    if isinstance(indices, slice):
        return indices
    return torch.as_tensor(indices, dtype=torch.int64).cpu()
