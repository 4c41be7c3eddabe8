"""Which augmentations are safe on data of which little is known."""

import re
from collections.abc import Sequence

# A class named by a side is another class in the mirror.
_SIDES = re.compile(r"(?<![a-z])(left|right|clockwise|counterclockwise|mirrored)(?![a-z])", re.IGNORECASE)


def choose_augmentation(channels: int, height: int, width: int, class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return what ``"auto"`` means for these images.

    - Characters and numbers (every class name is one character or a number), classes named by a side ("left turn") and
      all grey images: ``shift``. A mirrored 2 is no 2, and a mirrored radiograph shows another person.
    - Other RGB images: ``crop`` and ``flip``; above 64 pixels a side, where photographs differ in light, ``colour``
      too.
    """
    symbols = bool(class_names) and all(len(name) == 1 or _is_number(name) for name in class_names)
    sided = any(_SIDES.search(name) for name in class_names)
    if symbols or sided or channels == 1:
        return ("shift",)
    return ("crop", "flip", "colour") if max(height, width) > 64 else ("crop", "flip")


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[-+]?\d+([.,]\d+)?", name.strip()) is not None
