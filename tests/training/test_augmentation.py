"""Augmentation: every image has parameters of its own, the stream of torch decides, targets say what was mixed."""

import subprocess
import sys

import pytest
import torch

from convette.errors import UsageError
from convette.training.augmentation import AUGMENTATIONS, build_augmentation, choose_augmentation


def same_image_batch(count=64, channels=3, side=16):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, channels, side, side, generator=generator) * 0.8 + 0.1
    return image.expand(count, -1, -1, -1).clone()


def run(names, images, labels=None, seed=0, num_classes=10):
    torch.manual_seed(seed)
    labels = torch.arange(len(images)) % num_classes if labels is None else labels
    _, channels, height, width = images.shape
    return build_augmentation(names, channels, height, width, num_classes)(images, labels)


@pytest.mark.parametrize("name", ["shift", "crop", "flip", "colour", "erasing"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (28, 20), (72, 72)])
def test_parameters_are_drawn_per_image_and_the_shape_is_kept(name, channels, size):
    images = (
        torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(1)).expand(32, -1, -1, -1) * 0.8 + 0.1
    )
    original = images.clone()
    out, labels = run((name,), images)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert torch.equal(images, original)  # the input is not written to
    assert torch.equal(labels, torch.arange(32) % 10)
    assert len({tuple(row) for row in out.flatten(1).tolist()}) > 1
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_decides(name):
    images = torch.rand(16, 3, 16, 16)
    first, first_targets = run((name,), images, seed=3)
    again, again_targets = run((name,), images, seed=3)
    other, _ = run((name,), images, seed=4)
    assert torch.equal(first, again) and torch.equal(first_targets, again_targets)
    assert not torch.equal(first, other)


def test_a_chain_goes_on_where_the_random_stream_is_restored():
    images, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    augmentation = build_augmentation(AUGMENTATIONS, 3, 16, 16, 10)
    augmentation(images, labels)
    state = torch.get_rng_state()
    expected = augmentation(images, labels)
    torch.set_rng_state(state)
    resumed = build_augmentation(AUGMENTATIONS, 3, 16, 16, 10)(images, labels)
    assert torch.equal(expected[0], resumed[0]) and torch.equal(expected[1], resumed[1])


def test_flip_gives_the_image_or_its_mirror():
    images = same_image_batch()
    out, _ = run(("flip",), images)
    mirrored = torch.isclose(out, images.flip(-1)).flatten(1).all(1)
    kept = torch.isclose(out, images).flatten(1).all(1)
    assert (mirrored | kept).all() and 16 < mirrored.sum() < 48


def test_shift_moves_by_whole_pixels_up_to_an_eighth():
    # Each pixel says where it is, so the shift can be read off the middle.
    grid = (torch.arange(16)[:, None] * 16 + torch.arange(16)) / 255
    out, _ = run(("shift",), grid.expand(200, 1, 16, 16).clone())
    middle = (out[:, 0, 8, 8] * 255).round().long()
    rows, columns = middle // 16 - 8, middle % 16 - 8
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    # Edges are repeated, not filled with black.
    assert set((out * 255).round().long().unique().tolist()) <= set(range(256))
    assert torch.isclose(out[rows == 2][:, 0, -1], out[rows == 2][:, 0, -2]).all()


def test_erasing_blackens_a_part():
    out, _ = run(("erasing",), torch.ones(200, 1, 32, 32))
    share = (out == 0).float().mean(dim=(1, 2, 3))
    assert 60 < (share > 0).sum() < 140
    assert share[share > 0].min() > 0.01 and share.max() < 0.23
    assert len(share.unique()) > 20


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_soft_targets_are_the_shares_that_are_seen(name):
    # Image i is constant i / 15 and has label i, so the mean of the mixed image is the mean of its targets.
    images = (torch.arange(16) / 15)[:, None, None, None].expand(16, 1, 8, 8).clone()
    out, targets = run((name,), images, torch.arange(16), num_classes=16)
    assert targets.shape == (16, 16)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), targets @ (torch.arange(16) / 15), atol=1e-5, rtol=0)
    own = targets.diagonal()
    assert len(own.unique()) > 4  # a share for each image, not one for the batch


def test_cuts_lie_elsewhere_in_each_image():
    # kornia before 0.9 put all cuts of a batch at the same relative place.
    images = (torch.arange(512) / 511)[:, None, None, None].expand(512, 1, 16, 16).clone()
    out, _ = run(("cutmix",), images, torch.arange(512), num_classes=512)
    cut = (out != images)[:, 0]
    widths, starts = cut.any(dim=1).sum(dim=1), cut.any(dim=1).int().argmax(dim=1)
    assert set(starts[widths == 8].tolist()) == set(range(9))
    heights, tops = cut.any(dim=2).sum(dim=1), cut.any(dim=2).int().argmax(dim=1)
    square = (widths == 8) & (heights == 8)
    assert len(set(zip(starts[square].tolist(), tops[square].tolist(), strict=True))) > 10


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_last_batch_of_one_image_goes_through(name):
    images = torch.rand(1, 3, 16, 16)
    out, targets = run((name,), images, torch.tensor([2]))
    assert out.shape == images.shape and torch.isfinite(out).all()
    if targets.ndim == 2:
        torch.testing.assert_close(targets, torch.eye(10)[[2]])


def test_mixup_and_cutmix_together_mix_each_image_one_way():
    images = (torch.arange(64) / 63)[:, None, None, None].expand(64, 1, 8, 8).clone()
    out, targets = run(("cutmix", "mixup"), images, torch.arange(64), num_classes=64)
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), targets @ (torch.arange(64) / 63), atol=1e-5, rtol=0)
    assert (targets > 1e-6).sum(1).max() <= 2  # nobody is mixed twice
    blended = out.flatten(1).std(dim=1) < 1e-6
    assert 10 < blended.sum() < 60


def test_the_order_of_names_and_repeats_do_not_matter():
    images = torch.rand(8, 3, 16, 16)
    first, _ = run(("crop", "flip"), images)
    second, _ = run(["flip", "crop", "flip"], images)
    assert torch.equal(first, second)


def test_nothing_named_does_nothing():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    out, targets = build_augmentation((), 3, 8, 8, 4)(images, labels)
    assert torch.equal(out, images) and torch.equal(targets, labels)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'cutmix'"):
        build_augmentation(("cutmx",), 3, 32, 32, 10)


@pytest.mark.parametrize(
    ("channels", "side", "names", "expected"),
    [
        (1, 8, [str(digit) for digit in range(10)], ("shift",)),
        (3, 32, [str(digit) for digit in range(10)], ("shift",)),  # house numbers
        (3, 32, list("ABCDEF"), ("shift",)),
        (1, 28, ["shirt", "coat"], ("shift",)),
        (3, 64, ["turn left", "turn right"], ("shift",)),
        (3, 32, ["cat", "bright"], ("crop", "flip")),
        (3, 224, ["cat", "dog"], ("crop", "flip", "colour")),
    ],
)
def test_auto_is_chosen_by_the_data(channels, side, names, expected):
    assert choose_augmentation(channels, side, side, names) == expected
    built = build_augmentation("auto", channels, side, side, len(names), class_names=names)
    assert set(built.names) == set(expected)


def test_kornia_is_imported_only_when_used():
    code = (
        "import sys; from convette.training.augmentation import build_augmentation; "
        "build_augmentation((), 3, 8, 8, 2); assert 'kornia' not in sys.modules; "
        "build_augmentation(('flip',), 3, 8, 8, 2); assert 'kornia' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
