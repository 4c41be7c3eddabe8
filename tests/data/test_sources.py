"""Sources by name: the digits, torchvision's sets, names that are wrong, and a light import."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convette.data import load_data
from convette.errors import DataError, UsageError


def test_digits():
    data = load_data("digits")
    assert data.class_names == tuple("0123456789") and data.source == "digits"
    assert (len(data.train), len(data.validation), len(data.test)) == (1258, 180, 359)
    assert (data.preprocessing.channels, data.preprocessing.height, data.preprocessing.width) == (1, 8, 8)
    assert data.train.images([0]).dtype == torch.uint8
    assert data.train.images(slice(None)).max() == 255
    assert data.fingerprint == load_data("digits").fingerprint != load_data("digits", seed=1).fingerprint
    assert data.test.class_counts.min() >= 34
    larger = load_data("digits", image_size=16, channels=3)
    assert larger.test.images([0, 1]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("digts", "Did you mean 'digits'"),
        ("digits:8", "takes nothing after the colon"),
        ("foldr:x", "Did you mean 'folder'"),
        ("folder:", "write folder:PATH"),
        ("hub:", "write hub:NAME"),
        ("", "folder:PATH"),
        ("torchvision:CIFAR", "Did you mean CIFAR10 or CIFAR100"),
        ("torchvision:MNITS", "Did you mean 'MNIST'"),
    ],
)
def test_wrong_names_end_with_the_remedy(source, text):
    with pytest.raises(UsageError, match=text) as caught:
        load_data(source)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_bare_path_is_told_its_kind(make_folder):
    folder = make_folder()
    with pytest.raises(UsageError, match=f"write folder:{folder}"):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 0}, "image_size"),
        ({"channels": 2}, "channels"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "below 1"),
        ({"max_bad": 2.0}, "max_bad"),
        ({"seed": -1}, "seed"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values"),
        ({"std": (0.0,)}, "above 0"),
    ],
)
def test_wrong_options_end_with_the_remedy(options, text):
    with pytest.raises(UsageError, match=text):
        load_data("digits", **options)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_a_torchvision_set_on_disk(tmp_path):
    for prefix, count in (("train", 40), ("t10k", 20)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    data = load_data(f"torchvision:mnist?root={tmp_path}", validation_fraction=0.25)
    assert data.class_names[3] == "3 - three"
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert np.array_equal(
        data.test.images([0])[0, 0].numpy(), np.random.RandomState(20).randint(0, 256, (20, 28, 28))[0]
    )


def test_a_torchvision_set_of_files(tmp_path):
    from PIL import Image

    # EuroSAT: one folder a class, no splits, no array of pixels.
    for label, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (16, 16), (label, index, 7)).save(folder / f"{index}.png")
        (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    data = load_data(f"torchvision:EuroSAT?root={tmp_path}", max_bad=0.2)
    assert data.class_names == ("Forest", "River")
    assert torch.equal(data.train.images(slice(None))[:, 0, 0, 0].long(), data.train.labels)
    assert len(data.bad) == 2 and "damaged" in data.bad[0].reason


def test_a_torchvision_set_out_of_reach(tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import cifar

    def unreachable(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(DataError, match=r"torchvision:CIFAR10 is not in .*no network.*\?root=PATH"):
        load_data(f"torchvision:CIFAR10?root={tmp_path}")
    with pytest.raises(DataError, match=r"cannot be downloaded by torchvision"):
        load_data(f"torchvision:ImageNet?root={tmp_path}")


def test_importing_the_room_is_light():
    code = (
        "import sys, convette.data; heavy = {'sklearn', 'torchvision', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
