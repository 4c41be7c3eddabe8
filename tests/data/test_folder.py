"""Image folders: what is found by looking, and every way they can be wrong."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from convette.data import load_data
from convette.errors import DataError, UsageError


def load(folder, **options):
    return load_data(f"folder:{folder}", **options)


def splits(data):
    return [data.train, data.validation, data.test]


def test_a_flat_folder_is_divided_by_class(make_folder):
    data = load(make_folder(classes=("cat", "dog", "emu"), count=20))
    assert data.class_names == ("cat", "dog", "emu") and data.num_classes == 3
    assert [split.class_counts.tolist() for split in splits(data)] == [[14] * 3, [2] * 3, [4] * 3]
    assert [split.name for split in splits(data)] == ["train", "validation", "test"]
    size = data.preprocessing
    assert (size.channels, size.height, size.width) == (3, 8, 8)
    assert not data.bad and not data.notes
    # The pixel that tells the class says what the label says; no image is in two splits.
    seen = set()
    for split in splits(data):
        images = split.images(slice(None))
        assert torch.equal(images[:, 0, 0, 0].long(), split.labels)
        seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 60


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
def test_given_splits_are_kept(make_folder, validation):
    for name, count in (("train", 9), (validation, 4), ("test", 3)):
        folder = make_folder(f"set/{name}", count=count).parent
    assert [len(split) for split in splits(load(folder))] == [18, 8, 6]


def test_a_missing_validation_split_is_carved_from_training_only(make_folder):
    make_folder("set/test", count=5)
    folder = make_folder("set/train", count=20).parent
    data = load(folder, validation_fraction=0.25)
    assert [len(split) for split in splits(data)] == [30, 10, 10]


def test_division_depends_on_the_seed_only(make_folder):
    folder = make_folder(count=30)
    first, again, other = load(folder), load(folder), load(folder, seed=1)
    assert torch.equal(first.test.images(slice(None)), again.test.images(slice(None)))
    assert not torch.equal(first.test.images(slice(None)), other.test.images(slice(None)))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_statistics_are_those_of_the_training_pixels(make_folder):
    data = load(make_folder(count=30))
    pixels = data.train.images(slice(None)).double() / 255
    expected_std = pixels.std(dim=(0, 2, 3), correction=0)
    assert data.preprocessing.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert data.preprocessing.std == pytest.approx(expected_std.tolist(), abs=1e-5)
    normalised = data.preprocessing(data.train.images(slice(None)))
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    changed = data.with_preprocessing(mean=(0.5,), std=(0.1, 0.2, 0.3)).preprocessing
    assert changed.mean == (0.5, 0.5, 0.5) and changed.std == (0.1, 0.2, 0.3)
    given = load(make_folder(count=30), mean=(0.5, 0.5, 0.5)).preprocessing
    assert given.mean == (0.5, 0.5, 0.5) and given.std == data.preprocessing.std


def test_constant_images_do_not_divide_by_zero(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("L", (4, 4), 7).save(tmp_path / name / f"{index}.png")
    assert torch.isfinite(load(tmp_path).preprocessing(load(tmp_path).train.images([0]))).all()


def test_grey_stays_grey_and_a_mixture_becomes_rgb(make_folder):
    folder = make_folder(grey=True)
    assert load(folder).preprocessing.channels == 1
    assert load(folder, channels=3).train.images([0]).shape[1] == 3
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "cat" / "colour.png")
    mixed = load(folder)
    assert mixed.preprocessing.channels == 3
    assert any("grey images" in note for note in mixed.notes)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(40, 60)] * 6, (40, 60)), ([(50, 90), (45, 60), (70, 47)] * 2, (40, 40)), ([(300, 400)] * 6, (224, 224))],
)
def test_the_size_is_found_by_looking(tmp_path, sizes, expected):
    for label, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for index, (height, width) in enumerate(sizes):
            Image.new("RGB", (width, height), (index, label, 9)).save(tmp_path / name / f"{index}.png")
    data = load(tmp_path)
    assert (data.preprocessing.height, data.preprocessing.width) == expected
    assert any("cropped" in note for note in data.notes) == (expected != sizes[0])
    chosen = load(tmp_path, image_size=20)
    assert chosen.train.images([0]).shape == (1, 3, 20, 20)
    assert any("20x20" in note for note in chosen.notes)


def damage(folder):
    """Every kind of damage once, in class cat; returns the reasons by file name."""
    cat = folder / "cat"
    whole = (cat / "000.png").read_bytes()
    (cat / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (cat / "empty.png").write_bytes(b"")
    (cat / "notes.txt").write_text("not an image")
    (cat / "link.png").symlink_to(cat / "nowhere.png")
    Image.new("1", (9000, 9000)).save(cat / "bomb.png")
    return {
        "cut.png": "truncated",
        "empty.png": "empty file",
        "notes.txt": "not an image",
        "link.png": "No such file",
        "bomb.png": "bomb",
    }


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_bad_images_are_named_counted_and_skipped(make_folder, memory_limit):
    folder = make_folder(count=20)
    reasons = damage(folder)
    data = load(folder, max_bad=0.2, memory_limit=memory_limit, workers=0)
    if memory_limit:
        assert {os.path.basename(bad.name) for bad in data.bad} == set(reasons)
        assert sum(len(split) for split in splits(data)) == 40
        assert any("5 of 45 images left out" in note for note in data.notes)
    else:
        # A cut file looks whole until it is decoded, which a streamed set does later.
        assert {os.path.basename(bad.name) for bad in data.bad} == set(reasons) - {"cut.png"}
    for bad in data.bad:
        assert reasons[os.path.basename(bad.name)] in bad.reason and bad.split == "train"


def test_too_many_bad_images_end_with_the_first_few_named(make_folder):
    folder = make_folder(count=20)
    damage(folder)
    with pytest.raises(DataError, match=r"5 of 45 images.*bomb\.png.*cut\.png|4 of 45 images.*bomb\.png") as caught:
        load(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and "--max-bad" in str(caught.value)


def test_litter_hidden_files_and_pipes_are_no_images(make_folder):
    folder = make_folder()
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / ".cache").mkdir()
    os.mkfifo(folder / "cat" / "pipe.png")
    data = load(folder, max_bad=0.0)
    assert data.class_names == ("cat", "dog") and not data.bad


def test_files_in_deeper_folders_belong_to_the_class(make_folder):
    folder = make_folder()
    (folder / "cat" / "more").mkdir()
    (folder / "cat" / "000.png").rename(folder / "cat" / "more" / "000.png")
    assert sum(len(split) for split in splits(load(folder))) == 20


def test_a_class_may_be_named_like_a_split(make_folder):
    assert load(make_folder(classes=("bus", "train"))).class_names == ("bus", "train")


def test_streamed_equals_memory(make_folder):
    folder = make_folder(count=20, size=(10, 12))
    memory, streamed = load(folder), load(folder, memory_limit=0, workers=2)
    assert any("streamed" in note for note in streamed.notes)
    assert memory.preprocessing == streamed.preprocessing
    for one, other in zip(splits(memory), splits(streamed), strict=True):
        assert torch.equal(one.labels, other.labels)
        for left, right in zip(one.batches(4, shuffle=True), other.batches(4, shuffle=True), strict=True):
            assert torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)


def test_the_fingerprint_tells_sets_apart(make_folder):
    folder = make_folder(count=20)
    before = load(folder).fingerprint, load(folder, memory_limit=0).fingerprint
    path = folder / "dog" / "003.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[4, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)
    assert load(folder).fingerprint != before[0]
    path.rename(folder / "dog" / "other.png")
    assert load(folder, memory_limit=0).fingerprint != before[1]


def test_wrong_folders_end_with_the_remedy(make_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (4, 4)).save(flat / "a.png")
    with pytest.raises(DataError, match="no class folders"):
        load(flat)
    with pytest.raises(UsageError, match=r"does not exist\. Did you mean 'flat'"):
        load(tmp_path / "flatt")
    with pytest.raises(UsageError, match="is a file"):
        load(flat / "a.png")
    with pytest.raises(DataError, match="only one class"):
        load(make_folder("one", classes=("cat",)))
    empty = make_folder("empty")
    (empty / "emu").mkdir()
    with pytest.raises(DataError, match="class 'emu' has no training images"):
        load(empty)
    with pytest.raises(DataError, match="too few"):
        load(make_folder("few", count=1))


def test_wrong_splits_end_with_the_remedy(make_folder):
    make_folder("a/trian")
    with pytest.raises(DataError, match=r"no folder named train \(beside it: trian\)"):
        load(make_folder("a/test").parent)
    make_folder("b/train")
    with pytest.raises(DataError, match=r"'.*dogs'|dogs: no class of this name in .*Did you mean 'dog'"):
        load(make_folder("b/test", classes=("cat", "dogs")).parent)
    make_folder("c/train", classes=("cat", "dog", "emu"))
    with pytest.raises(DataError, match="no folder for class 'emu'"):
        load(make_folder("c/test").parent)
    make_folder("d/val")
    make_folder("d/train")
    with pytest.raises(DataError, match="two folders for one split"):
        load(make_folder("d/validation").parent)
    (make_folder("e/train").parent / "test").mkdir()
    with pytest.raises(DataError, match="test: has no class folders"):
        load(make_folder("e/train").parent)


def test_classes_too_small_to_be_divided_stay_in_training_with_a_note(make_folder):
    make_folder(classes=("cat", "dog"), count=20)
    data = load(make_folder(classes=("rare",), count=1))
    assert data.train.class_counts.tolist() == [14, 14, 1]
    assert any("test split has no image of 1 classes, such as 'rare'" in note for note in data.notes)


def test_a_class_whose_images_are_all_damaged_is_named(make_folder):
    folder = make_folder()
    for path in (folder / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="'dog' has no training image that can be read"):
        load(folder, max_bad=1.0)
