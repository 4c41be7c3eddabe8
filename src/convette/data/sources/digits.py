"""`digits`: 1,797 grey handwritten digits of 8 x 8 pixels, inside scikit-learn."""

from typing import Any

import numpy as np

from convette.data._examples import ArrayExamples, RawData


def read(target: str, options: dict[str, str]) -> RawData:
    """Return the digits; their grey levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    examples = ArrayExamples(images, digits.target.astype(np.int64), "digits")
    return RawData(tuple(str(name) for name in digits.target_names), {"train": examples})
