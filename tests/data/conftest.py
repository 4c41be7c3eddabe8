"""Small image sets made on the spot."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` noise images for each class name below `root`; the red (or grey) mean tells the class."""

    def make(root: str = "set", classes=("cat", "dog"), count: int = 10, size=(8, 8), grey: bool = False) -> Path:
        folder = tmp_path / root
        for label, name in enumerate(classes):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = noise(1000 * label + index, *size, *(() if grey else (3,)))
                pixels[0, 0] = label
                (folder / name / f"{index:03}.png").write_bytes(encode(pixels))
        return folder

    return make


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    """Write images and labels in the layout of the Image feature of `datasets`."""

    def write(path: Path, images, labels, *, names=None, columns=("image", "label"), metadata=True, extra=None) -> Path:
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        cells = [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(images)]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        arrays = {columns[0]: pa.array(cells, struct), columns[1]: pa.array(labels), **(extra or {})}
        table = pa.table(arrays)
        if metadata:
            label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
            features = {columns[0]: {"_type": "Image"}, columns[1]: label}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        elif names:
            table = table.replace_schema_metadata({"class_names": json.dumps(names)})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    return write
