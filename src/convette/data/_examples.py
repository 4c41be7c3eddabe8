"""What a source hands over: labelled images, not yet decoded, each with a name for the error messages."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from convette.data._decode import Frame, Header, UnreadableImage, decode, decode_file, read_header, to_frame
from convette.errors import DataError

# A source gives this label to an image whose label is missing.
NO_LABEL = -1


@dataclass(frozen=True)
class BadImage:
    """An image left out: its file or row, the split it belongs to, and why."""

    name: str
    split: str
    reason: str


def too_many_bad(bad: Sequence[BadImage], total: int, max_bad: float) -> None:
    """Raise `DataError` naming the first few when `bad` is more than the share `max_bad` of `total` images."""
    if len(bad) <= max_bad * total:
        return
    first = "; ".join(f"{item.name}: {item.reason}" for item in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise DataError(
        f"{len(bad)} of {total} images cannot be used ({first}{more}), more than the {max_bad * 100:.3g}% allowed. "
        f"Repair or remove them, or allow more with --max-bad {min(len(bad) / total * 100 + 0.05, 100):.1f}%."
    )


class Examples(ABC):
    """Labelled images of one split, still encoded. `labels` index the class names; `NO_LABEL` marks a missing one."""

    labels: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the file or row, for messages."""

    @abstractmethod
    def header(self, index: int) -> Header:
        """Read size and colour; raises `UnreadableImage`."""

    @abstractmethod
    def pixels(self, index: int, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
        """Decode one image into `frame`; raises `UnreadableImage`."""

    @abstractmethod
    def mean_bytes(self) -> float:
        """Return about how many bytes an encoded image has (large ones are decoded by several threads)."""

    @abstractmethod
    def update(self, digest: "hashlib._Hash") -> None:
        """Add what identifies the images without decoding them."""


class ArrayExamples(Examples):
    """Images that come decoded, all of one shape: uint8 ``n c h w``."""

    def __init__(self, images: UInt8[np.ndarray, "n c h w"], labels: Int64[np.ndarray, " n"], title: str) -> None:
        self.array = images
        self.labels = labels
        self.title = title

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"

    def header(self, index: int) -> Header:
        _, channels, height, width = self.array.shape
        return Header(width, height, channels == 1)

    def pixels(self, index: int, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
        if self.array.shape[1:] == (frame.channels, frame.height, frame.width):
            return self.array[index]
        grey = self.array.shape[1] == 1
        image = Image.fromarray(self.array[index, 0] if grey else self.array[index].transpose(1, 2, 0).copy())
        return to_frame(image, frame)

    def mean_bytes(self) -> float:
        return 0.0

    def update(self, digest: "hashlib._Hash") -> None:
        digest.update(np.ascontiguousarray(self.array).data)


class FileExamples(Examples):
    """Image files below a folder, by their paths relative to it."""

    def __init__(self, root: Path, files: Sequence[str], labels: Int64[np.ndarray, " n"], sizes: Sequence[int]) -> None:
        self.root = root
        # An array of fixed-width strings would be far larger, a list of a million strings is fine.
        self.files = list(files)
        self.labels = labels
        self.sizes = np.asarray(sizes, dtype=np.int64)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def header(self, index: int) -> Header:
        try:
            with (self.root / self.files[index]).open("rb") as file:
                return read_header(file)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def pixels(self, index: int, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
        return decode_file(self.root / self.files[index], frame)

    def mean_bytes(self) -> float:
        return float(self.sizes.mean()) if len(self.sizes) else 0.0

    def update(self, digest: "hashlib._Hash") -> None:
        digest.update("\0".join(self.files).encode())
        digest.update(self.sizes.data)


class ArrowExamples(Examples):
    """Encoded images in an Arrow column: binary, or the struct {bytes, path} of the `datasets` library."""

    def __init__(self, holder: Any, column: str, labels: Int64[np.ndarray, " n"], title: str, files: bool) -> None:
        """Keep `holder`, a `pyarrow.Table` or a `datasets.Dataset` (which worker processes reopen by its file).

        `files` says whether a row without bytes may name a file of this machine (the cache of the hub).
        """
        self.holder = holder
        self.column = column
        self.labels = labels
        self.title = title
        self.files = files
        self._chunks: tuple[list[Any], np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None}

    def _cell(self, index: int) -> Any:
        if self._chunks is None:
            table = getattr(self.holder, "data", self.holder)
            chunks = table.column(self.column).chunks
            self._chunks = chunks, np.cumsum([0, *(len(chunk) for chunk in chunks)])
        chunks, starts = self._chunks
        place = int(np.searchsorted(starts, index, side="right")) - 1
        return chunks[place][index - int(starts[place])].as_py()

    def _encoded(self, index: int) -> bytes:
        cell = self._cell(index)
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, Mapping):
            if cell.get("bytes") is not None:
                return cell["bytes"]
            if self.files and cell.get("path"):
                return _read_file(Path(cell["path"]))
        raise UnreadableImage("no image in this row")

    def name(self, index: int) -> str:
        cell = self._cell(index)
        path = cell.get("path") if isinstance(cell, Mapping) else None
        return f"{self.title} row {index}" + (f" ({path})" if path else "")

    def header(self, index: int) -> Header:
        return read_header(self._encoded(index))

    def pixels(self, index: int, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
        return decode(self._encoded(index), frame)

    def mean_bytes(self) -> float:
        sample = range(0, len(self), max(1, len(self) // 16))
        sizes = [len(self._encoded(index)) for index in sample if self._has_bytes(index)]
        return float(np.mean(sizes)) if sizes else 0.0

    def _has_bytes(self, index: int) -> bool:
        try:
            return bool(self._encoded(index))
        except UnreadableImage:
            return False

    def update(self, digest: "hashlib._Hash") -> None:
        # All bytes of a set too large for memory would take minutes: the first of every stretch of images do.
        for index in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(self._encoded(index) if self._has_bytes(index) else b"-")


class ObjectExamples(Examples):
    """Images that a library hands over one by one as `PIL.Image`."""

    def __init__(self, read: Callable[[int], Any], labels: Int64[np.ndarray, " n"], title: str) -> None:
        self.read = read
        self.labels = labels
        self.title = title

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"

    def _image(self, index: int) -> Image.Image:
        try:
            image = self.read(index)
        except Exception as error:  # whatever the library raises, the image cannot be used
            raise UnreadableImage(f"damaged ({str(error)[:80]})") from error
        if not isinstance(image, Image.Image):
            raise UnreadableImage(f"a {type(image).__name__}, not an image")
        return image

    def header(self, index: int) -> Header:
        image = self._image(index)
        return Header(*image.size, grey=image.mode in ("1", "L", "LA"))

    def pixels(self, index: int, frame: Frame) -> UInt8[np.ndarray, "c h w"]:
        return to_frame(self._image(index), frame)

    def mean_bytes(self) -> float:
        return 0.0

    def update(self, digest: "hashlib._Hash") -> None:
        digest.update(self.title.encode())


@dataclass(frozen=True)
class RawData:
    """A source as it was found: class names and splits ("train" always, "validation" and "test" where they exist)."""

    class_names: tuple[str, ...]
    splits: dict[str, Examples]
    notes: tuple[str, ...] = field(default=())


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
