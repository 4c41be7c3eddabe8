"""Passing over all images of a source: reading headers, decoding into one array."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int32

from convette._progress import progress
from convette._typing import ImageBytes
from convette.data._decode import Frame, UnreadableImage
from convette.data._examples import NO_LABEL, ArrayExamples, BadImage, Examples

_CHUNK = 256
# Decoding a small image is mostly Python, where threads stand in each other's way (measured: two threads take twice as
# long on 28 x 28 PNGs); from here on the decoders, which release the interpreter lock, outweigh that.
_THREADS_ABOVE = 16_384


def inspect(examples: Examples, name: str) -> tuple[Int32[np.ndarray, "n 3"], dict[int, BadImage]]:
    """Read the header of every image: (height, width, is grey) by row, zeros for the bad ones, which come with it."""
    headers = np.zeros((len(examples), 3), dtype=np.int32)
    bad: dict[int, BadImage] = {}

    def look(row: int) -> None:
        try:
            if examples.labels[row] == NO_LABEL:
                raise UnreadableImage("no label")
            header = examples.header(row)
            headers[row] = header.height, header.width, header.grey
        except UnreadableImage as error:
            bad[row] = BadImage(examples.name(row), name, str(error))

    if isinstance(examples, ArrayExamples):
        _, channels, height, width = examples.array.shape
        headers[:] = height, width, channels == 1
        for row in np.flatnonzero(examples.labels == NO_LABEL).tolist():
            bad[row] = BadImage(examples.name(row), name, "no label")
    else:
        _for_all(examples, look, f"looking at the {name} images")
    return headers, dict(sorted(bad.items()))


def decode_all(examples: Examples, name: str, frame: Frame, skip: set[int]) -> tuple[ImageBytes, dict[int, BadImage]]:
    """Decode every image but those in `skip` (left black) into one tensor; return it and the bad ones met."""
    if isinstance(examples, ArrayExamples) and examples.array.shape[1:] == (frame.channels, frame.height, frame.width):
        return torch.from_numpy(np.ascontiguousarray(examples.array)), {}
    pixels = np.zeros((len(examples), frame.channels, frame.height, frame.width), dtype=np.uint8)
    bad: dict[int, BadImage] = {}

    def fill(row: int) -> None:
        if row in skip:
            return
        try:
            pixels[row] = examples.pixels(row, frame)
        except UnreadableImage as error:
            bad[row] = BadImage(examples.name(row), name, str(error))

    _for_all(examples, fill, f"decoding the {name} images")
    return torch.from_numpy(pixels), dict(sorted(bad.items()))


def _for_all(examples: Examples, visit: Callable[[int], None], title: str) -> None:
    def visit_chunk(rows: range) -> int:
        for row in rows:
            visit(row)
        return len(rows)

    chunks = [range(start, min(start + _CHUNK, len(examples))) for start in range(0, len(examples), _CHUNK)]
    with progress(title, len(examples), "image") as advance:
        for count in _run(visit_chunk, chunks, threads=examples.mean_bytes() > _THREADS_ABOVE):
            advance(count)


def _run(visit: Callable[[range], int], chunks: list[range], *, threads: bool) -> Iterator[int]:
    if not threads:
        yield from map(visit, chunks)
        return
    with ThreadPoolExecutor() as pool:
        try:
            yield from pool.map(visit, chunks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
