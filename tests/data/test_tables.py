"""Parquet and hub sets: columns, labels, class names and splits found by looking."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from convette.data import load_data
from convette.data.sources import parquet
from convette.errors import DataError, UsageError


def noise(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (6, 5), dtype=np.uint8)


def pictures(count: int, first: int = 0) -> list[bytes]:
    return [save(noise(first + index)) for index in range(count)]


def save(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def load(path, **options):
    return load_data(f"parquet:{path}", **options)


def every(data) -> int:
    return sum(len(split) for split in (data.train, data.validation, data.test))


def test_names_from_the_huggingface_metadata_and_pixels_as_written(tmp_path, write_parquet):
    labels = [index % 2 for index in range(40)]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", pictures(40), labels, names=["no", "yes"])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pictures(6, 100), labels[:6], names=["no", "yes"])
    data = load(tmp_path)
    assert data.class_names == ("no", "yes")
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 6)
    assert data.preprocessing.channels == 1 and (data.preprocessing.height, data.preprocessing.width) == (6, 5)
    assert np.array_equal(data.test.images(slice(None)).numpy()[:, 0], [noise(100 + index) for index in range(6)])
    assert data.test.labels.tolist() == labels[:6]


def test_names_from_class_names_and_from_the_labels_themselves(tmp_path, write_parquet):
    numbers, words = [index % 3 for index in range(30)], [("emu", "cat", "dog")[index % 3] for index in range(30)]
    named = write_parquet(tmp_path / "a.parquet", pictures(30), numbers, names=["x", "y", "z"], metadata=False)
    assert load(named).class_names == ("x", "y", "z")
    by_word = load(write_parquet(tmp_path / "b.parquet", pictures(30), words))
    assert by_word.class_names == ("cat", "dog", "emu")
    assert by_word.train.class_counts.tolist() == [7, 7, 7]
    sparse = load(write_parquet(tmp_path / "c.parquet", pictures(30), [10 + 5 * number for number in numbers]))
    assert sparse.class_names == ("10", "15", "20") and sorted(sparse.train.labels.unique().tolist()) == [0, 1, 2]


def test_shards_in_order_and_a_missing_one_is_told(tmp_path, write_parquet):
    for shard in range(3):
        path = tmp_path / "data" / f"train-{shard:05}-of-00003.parquet"
        write_parquet(path, pictures(10, 10 * shard), [0, 1] * 5, names=["a", "b"])
    data = load(tmp_path, validation_fraction=0.1, test_fraction=0.1)
    assert every(data) == 30
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"shard 1 of 3 .* is missing"):
        load(tmp_path)


def test_validation_files_and_unlabelled_test_files(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", pictures(20), [0, 1] * 10, names=["a", "b"])
    write_parquet(tmp_path / "valid.parquet", pictures(4, 50), [0, 1] * 2, names=["a", "b"])
    write_parquet(tmp_path / "test.parquet", pictures(4, 60), [-1] * 4, names=["a", "b"])
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 4)
    assert any("no labels" in note for note in data.notes)


def test_other_columns_are_found_or_named(tmp_path, write_parquet):
    import pyarrow as pa

    extra = {"mask": pa.array(pictures(20)), "kind": pa.array([0, 1] * 10)}
    path = write_parquet(tmp_path / "a.parquet", pictures(20), [0, 1] * 10, columns=("img", "target"), extra=extra)
    assert every(load(path)) == 20
    odd = write_parquet(tmp_path / "b.parquet", pictures(20), [0, 1] * 10, columns=("scan", "finding"), metadata=False)
    with pytest.raises(DataError, match=r"no label column found \(columns: scan \(struct.*finding \(int64\)"):
        load(odd)
    assert every(load(f"{odd}?label=finding")) == 20
    with pytest.raises(UsageError, match="Did you mean 'finding'"):
        load(f"{odd}?label=findin")
    with pytest.raises(UsageError, match="Did you mean 'label'"):
        load(f"{odd}?lable=finding")
    two = write_parquet(
        tmp_path / "c.parquet",
        pictures(20),
        [0, 1] * 10,
        columns=("left", "label"),
        extra={"right": pa.array(pictures(20))},
        metadata=False,
    )
    with pytest.raises(DataError, match=r"\?image=COLUMN"):
        load(two)
    assert every(load(f"{two}?image=right&label=label")) == 20


def test_rows_without_image_or_label_are_bad_images(tmp_path, write_parquet):
    images, labels = pictures(40), [0, 1] * 20
    images[3], images[5], labels[7] = None, b"garbage", None
    path = write_parquet(tmp_path / "a.parquet", images, labels, names=["a", "b"])
    with pytest.raises(DataError, match="3 of 40 images"):
        load(path)
    data = load(path, max_bad=0.1)
    assert every(data) == 37
    assert [bad.reason for bad in data.bad] == ["no image in this row", "not an image of a known format", "no label"]
    assert "row 3 (3.png)" in data.bad[0].name


def test_a_row_may_not_name_a_file_of_this_machine(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = tmp_path / "secret.png"
    secret.write_bytes(pictures(1)[0])
    cells = pa.array(
        [{"bytes": None, "path": str(secret)}] * 10, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 5}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no image in this row"):
        load(tmp_path / "a.parquet")


def test_labels_that_cannot_be(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "a.parquet", pictures(6), [0, 1, 2] * 2, names=["a", "b"])
    with pytest.raises(DataError, match="label 2 has no name; the file names 2 classes"):
        load(path)
    path = write_parquet(tmp_path / "b.parquet", pictures(6), [0.5, 1.0, 2.0] * 2)
    with pytest.raises(DataError, match="expected integers or names"):
        load(f"{path}?label=label")
    path = write_parquet(tmp_path / "c.parquet", pictures(6), [0] * 6, names=["a", "b", "c"])
    with pytest.raises(DataError, match="class 'b' has no training images \\(2 of 3"):
        load(path)


def test_files_that_cannot_be(tmp_path, write_parquet):
    with pytest.raises(DataError, match=r"holds no \*\.parquet"):
        load(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(tmp_path)
    write_parquet(tmp_path / "train.parquet", pictures(20), [0, 1] * 10)
    write_parquet(tmp_path / "tset-00000-of-00001.parquet", pictures(20), [0, 1] * 10)
    with pytest.raises(DataError, match="Did you mean 'test'"):
        load(tmp_path)
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "tset-00000-of-00001.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no train"):
        load(tmp_path)
    path = write_parquet(tmp_path / "whole.parquet", pictures(20), [0, 1] * 10)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(path)


def test_streamed_rows_equal_those_in_memory(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "a.parquet", pictures(40), [0, 1] * 20, names=["a", "b"])
    memory, streamed = load(path), load(path, memory_limit=0, workers=1)
    for one, other in zip(memory.train.batches(8, shuffle=True), streamed.train.batches(8, shuffle=True), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_files_too_large_to_read_whole_are_mapped(tmp_path, write_parquet, monkeypatch, own_cache):
    path = write_parquet(tmp_path / "a.parquet", pictures(40), [0, 1] * 20, names=["a", "b"])
    whole = load(path)
    monkeypatch.setattr(parquet, "MAPPED_ABOVE", 0)
    mapped = load(path, memory_limit=0, workers=1)
    assert mapped.class_names == whole.class_names
    assert torch.equal(mapped.test.images(slice(None)), whole.test.images(slice(None)))
    batch = next(iter(mapped.train.batches(5)))
    assert torch.equal(batch.images, whole.train.images(range(5)))


def test_hub_sets_are_read_like_files(tmp_path, monkeypatch, own_cache):
    features = own_cache.Features({"image": own_cache.Image(), "label": own_cache.ClassLabel(names=["a", "b"])})
    path = tmp_path / "cached.png"
    path.write_bytes(pictures(1)[0])

    def made(count):
        rows = {
            "image": [{"bytes": content, "path": None} for content in pictures(count)],
            "label": [0, 1] * (count // 2),
        }
        rows["image"][0] = {"bytes": None, "path": str(path)}  # as folders of images come from the hub
        return own_cache.Dataset.from_dict(rows, features=features)

    found = own_cache.DatasetDict({"train": made(20), "test": made(6), "extra": made(2)})
    asked = []
    monkeypatch.setattr(own_cache, "load_dataset", lambda *arguments: asked.append(arguments) or found)
    data = load_data("hub:someone/something?config=small")
    assert asked == [("someone/something", "small")]
    assert data.class_names == ("a", "b") and (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)
    assert any("extra" in note for note in data.notes) and not data.bad


def test_a_hub_set_out_of_reach_is_one_line_with_the_remedy(monkeypatch, own_cache):
    def unreachable(*arguments):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(own_cache, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"hub:nobody/nothing cannot be loaded \(Couldn't reach the Hub\).*parquet:PATH"
    ) as caught:
        load_data("hub:nobody/nothing")
    assert "\n" not in str(caught.value)
