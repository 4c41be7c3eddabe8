"""Carving a stratified part out of labelled images, the same on every machine."""

import numpy as np
from jaxtyping import Int64


def carve(
    labels: Int64[np.ndarray, " n"], size: int, seed: int, stream: int
) -> tuple[Int64[np.ndarray, " part"], Int64[np.ndarray, " rest"]]:
    """Return the places of a stratified part of about `size` labels, and the places left, each in ascending order.

    Every class gives its share, rounded so that the shares add up (largest remainder first, ties to the lower class),
    but keeps at least one. Which ones depends on `seed`, `stream` and the number of labels alone.
    """
    counts = np.bincount(labels)
    exact = counts * (size / max(len(labels), 1))
    share = np.minimum(np.floor(exact).astype(np.int64), np.maximum(counts - 1, 0))
    room = np.maximum(counts - 1, 0) - share
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    # Rarely more than one round: only where classes of one image cannot give their share.
    while (missing := size - int(share.sum())) > 0 and room.any():
        for label in [label for label in by_remainder if room[label] > 0][:missing]:
            share[label] += 1
            room[label] -= 1
    words = np.random.Philox(key=np.array([seed, 2**32 + stream], dtype=np.uint64)).random_raw(len(labels))
    chosen = np.zeros(len(labels), dtype=bool)
    for label, number in enumerate(share):
        places = np.flatnonzero(labels == label)
        chosen[places[np.argsort(words[places], kind="stable")[:number]]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
