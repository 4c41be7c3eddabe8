"""Batches: one order whatever the storage, the ranks or the point of resuming."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.data import MemorySplit, StreamedSplit, load_data
from convette.data._decode import Frame, UnreadableImage
from convette.data._examples import ArrayExamples
from convette.data._partition import carve
from convette.data._splits import epoch_order
from convette.errors import DataError, UsageError


def numbered(n: int) -> MemorySplit:
    """Image i is constant i, so that pixels tell which image it is."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).contiguous()
    return MemorySplit("train", pixels, torch.arange(n) % 3, 3)


def streamed(n: int, workers: int = 0) -> StreamedSplit:
    memory = numbered(n)
    examples = ArrayExamples(memory.pixels.numpy(), memory.labels.numpy(), "numbers")
    return StreamedSplit("train", examples, torch.arange(n), 3, Frame(1, 2, 2), workers=workers)


def positions(split, *args, **kwargs) -> list[list[int]]:
    return [batch.indices.tolist() for batch in split.batches(*args, **kwargs)]


def order(split, *args, **kwargs) -> list[int]:
    return [index for batch in positions(split, *args, **kwargs) for index in batch]


@given(
    n=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
    shuffle=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_shows_every_image_once(n, size, seed, epoch, shuffle):
    split = numbered(n)
    seen = []
    for batch in split.batches(size, shuffle=shuffle, seed=seed, epoch=epoch):
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
        assert torch.equal(batch.labels, batch.indices % 3)
        assert len(batch) <= size
        seen += batch.indices.tolist()
    assert sorted(seen) == list(range(n))
    assert shuffle or seen == list(range(n))
    assert split.num_batches(size) == -(-n // size)


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    split = numbered(50)
    first = positions(split, 7, shuffle=True, seed=1, epoch=2)
    torch.manual_seed(123)
    assert positions(split, 7, shuffle=True, seed=1, epoch=2) == first
    assert order(split, 10, shuffle=True, seed=1, epoch=2) == order(split, 7, shuffle=True, seed=1, epoch=2)
    assert positions(split, 7, shuffle=True, seed=2, epoch=2) != first
    assert positions(split, 7, shuffle=True, seed=1, epoch=3) != first


def test_the_order_is_pinned_so_that_runs_can_be_resumed_elsewhere():
    assert epoch_order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_batches_leave_the_random_stream_alone():
    state = torch.get_rng_state()
    list(numbered(20).batches(4, shuffle=True))
    list(streamed(20).batches(4, shuffle=True))
    list(streamed(20, workers=1).batches(4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


@given(n=st.integers(1, 50), size=st.integers(1, 9), world=st.integers(1, 5), drop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_order_in_equal_numbers_of_batches(n, size, world, drop):
    split = numbered(n)
    options = {"shuffle": True, "seed": 3, "epoch": 1, "drop_last": drop, "world_size": world}
    shares = [positions(split, size, rank=rank, **options) for rank in range(world)]
    lengths = {tuple(len(batch) for batch in share) for share in shares}
    assert len(lengths) == 1
    assert len(shares[0]) == split.num_batches(size, drop_last=drop, world_size=world)
    together = [index for step in zip(*shares, strict=True) for place in zip(*step, strict=True) for index in place]
    whole = order(split, size, shuffle=True, seed=3, epoch=1)
    if drop:
        assert together[:n] == whole[: len(together)]
    else:
        assert together[:n] == whole and len(together) - n < world


@given(skip=st.integers(0, 12))
def test_skipping_leaves_the_rest_as_it_was(skip):
    split = numbered(40)
    assert positions(split, 4, shuffle=True, skip=skip) == positions(split, 4, shuffle=True)[skip:]


def test_skipped_batches_are_not_decoded():
    split = streamed(40)
    read = []
    original = split.examples.pixels
    split.examples.pixels = lambda index, frame: read.append(index) or original(index, frame)
    list(split.batches(10, skip=3))
    assert read == list(range(30, 40))


def test_drop_last_keeps_full_batches_and_never_drops_all():
    assert [len(batch) for batch in positions(numbered(10), 4, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in positions(numbered(3), 4, drop_last=True)] == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_what_memory_gives(workers):
    for one, other in zip(
        numbered(23).batches(5, shuffle=True, seed=4, epoch=1, skip=1),
        streamed(23, workers).batches(5, shuffle=True, seed=4, epoch=1, skip=1),
        strict=True,
    ):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.indices, other.indices)


def test_images_by_position():
    for split in (numbered(10), streamed(10)):
        for indices in ([3, 1, 1], torch.tensor([3, 1, 1]), np.array([3, 1, 1])):
            assert split.images(indices)[:, 0, 0, 0].tolist() == [3, 1, 1]
        assert split.images(range(2, 4))[:, 0, 0, 0].tolist() == [2, 3]
        assert split.images(slice(7, None))[:, 0, 0, 0].tolist() == [7, 8, 9]
        assert split.images([]).shape == (0, 1, 2, 2)
        assert split.class_counts.tolist() == [4, 3, 3]


def test_a_streamed_split_can_be_sent_to_another_process(make_folder):
    data = load_data(f"folder:{make_folder()}", memory_limit=0, workers=0)
    copy = pickle.loads(pickle.dumps(data.train))  # noqa: S301
    assert torch.equal(copy.images([0, 1]), data.train.images([0, 1]))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"skip": -1}, {"rank": 2, "world_size": 2}, {"epoch": -1}, {"seed": -1}]
)
def test_impossible_batches_are_refused_at_once(options):
    with pytest.raises(UsageError):
        numbered(5).batches(**{"batch_size": 2, **options})


class Damaged(ArrayExamples):
    """Some images fail only when decoded, as truncated files do."""

    def __init__(self, split: MemorySplit, damaged: set[int]) -> None:
        super().__init__(split.pixels.numpy(), split.labels.numpy(), "numbers")
        self.damaged = damaged

    def pixels(self, index, frame):
        if index in self.damaged:
            raise UnreadableImage("truncated")
        return super().pixels(index, frame)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_found_damaged_while_streaming_are_replaced_by_their_class(workers, capsys):
    examples = Damaged(numbered(30), {4, 7})
    split = StreamedSplit("train", examples, torch.arange(30), 3, Frame(1, 2, 2), workers=workers, max_bad=0.1)
    for _ in range(2):
        shown = torch.cat([batch.indices for batch in split.batches(10)]).tolist()
        assert shown[4] == 10 and shown[7] == 10  # the next whole one of class 1
        assert len(shown) == 30
    assert [(bad.name, bad.reason) for bad in split.bad.values()] == [
        ("numbers image 4", "truncated"),
        ("numbers image 7", "truncated"),
    ]
    assert capsys.readouterr().err.count("numbers image 4") == 1


def test_too_many_damaged_images_end_the_stream():
    split = StreamedSplit("train", Damaged(numbered(30), {4, 7}), torch.arange(30), 3, Frame(1, 2, 2), workers=0)
    with pytest.raises(DataError, match="numbers image 4: truncated"):
        list(split.batches(10))


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), share=st.floats(0.05, 0.5), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_carving_is_stratified_and_leaves_every_class_something(counts, share, seed):
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    size = max(1, round(share * len(labels)))
    part, rest = carve(labels, size, seed, 1)
    assert sorted([*part, *rest]) == list(range(len(labels)))
    assert len(part) == min(size, sum(count - 1 for count in counts))
    taken = np.bincount(labels[part], minlength=len(counts))
    for label, count in enumerate(counts):
        assert taken[label] < count
        if min(counts) >= 5:
            assert abs(taken[label] - count * share) < 2
    assert np.array_equal(carve(labels, size, seed, 1)[0], part)


def test_carving_depends_on_seed_and_stream():
    labels = np.arange(200) % 4
    first = carve(labels, 40, 0, 1)[0].tolist()
    assert carve(labels, 40, 1, 1)[0].tolist() != first
    assert carve(labels, 40, 0, 2)[0].tolist() != first
