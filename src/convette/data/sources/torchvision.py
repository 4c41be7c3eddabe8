"""`torchvision:NAME`: a classification set of torchvision.datasets, by its class name (CIFAR10, SVHN, MNIST ...).

``?root=PATH`` says where it lies or is to be downloaded to; the default is the folder convette/torchvision of the
user's cache.
"""

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convette.data._examples import ArrayExamples, Examples, ObjectExamples, RawData
from convette.errors import DataError, UsageError, did_you_mean

# What torchvision calls the splits, by the values its classes accept for `split`.
_SPLIT_VALUES = {"train": ("train", "trainval"), "validation": ("val", "valid"), "test": ("test",)}
_LABEL_FIELDS = ("targets", "labels", "_labels", "y")


def read(target: str, options: dict[str, str]) -> RawData:
    """Open (download if need be) the splits of a torchvision set."""
    import torchvision.datasets as sets

    kinds = {
        name: value
        for name, value in vars(sets).items()
        if inspect.isclass(value) and issubclass(value, sets.VisionDataset) and name != "VisionDataset"
    }
    by_lower = {name.lower(): name for name in kinds}
    if target.lower() not in by_lower:
        like = sorted(name for lower, name in by_lower.items() if target.lower() in lower)
        hint = f" Did you mean {' or '.join(like)}?" if like else did_you_mean(target, kinds)
        raise UsageError(f"torchvision has no data set {target!r}.{hint}")
    name = by_lower[target.lower()]
    root = Path(options.get("root") or _cache()).expanduser()
    opened = _open_splits(kinds[name], name, root)
    class_names = _class_names(opened["train"], name)
    splits = {split: _examples(dataset, f"torchvision:{name} {split}") for split, dataset in opened.items()}
    if class_names is None:
        numbers = 1 + max(int(examples.labels.max()) for examples in splits.values())
        class_names = tuple(str(number) for number in range(numbers))
    return RawData(class_names, splits)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convette" / "torchvision"


def _open_splits(kind: Callable[..., Any], name: str, root: Path) -> dict[str, Any]:
    accepted = inspect.signature(kind).parameters
    if "train" in accepted:
        return {split: _open(kind, name, root, {"train": split == "train"}) for split in ("train", "test")}
    if "split" not in accepted:
        return {"train": _open(kind, name, root, {})}
    opened: dict[str, Any] = {}
    for split, values in _SPLIT_VALUES.items():
        for value in values:
            # A split that a set does not have is a ValueError there.
            with contextlib.suppress(ValueError):
                opened[split] = _open(kind, name, root, {"split": value})
                break
    if "train" not in opened:
        raise DataError(f"torchvision:{name} has no training split.")
    return opened


def _open(kind: Callable[..., Any], name: str, root: Path, arguments: dict[str, Any]) -> Any:
    accepted = inspect.signature(kind).parameters
    try:
        return kind(root=str(root), **arguments)
    except (RuntimeError, OSError) as error:
        if "download" not in accepted:
            raise DataError(
                f"torchvision:{name} is not in {root} ({_first(error)}) and cannot be downloaded by torchvision; "
                f"put it there, or name its folder with torchvision:{name}?root=PATH."
            ) from error
    except TypeError as error:
        raise DataError(f"torchvision:{name} cannot be opened by its name alone ({_first(error)}).") from error
    try:
        return kind(root=str(root), download=True, **arguments)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"torchvision:{name} is not in {root} and cannot be downloaded ({_first(error)}); "
            f"connect, or name its folder with torchvision:{name}?root=PATH."
        ) from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _class_names(dataset: Any, name: str) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or not names:
        return None
    # ImageNet gives several names a class; the first is the usual one.
    return tuple(str(entry[0] if isinstance(entry, tuple) else entry) for entry in names)


def _examples(dataset: Any, title: str) -> Examples:
    labels = _labels(dataset, title)
    pixels = getattr(dataset, "data", None)
    if pixels is not None:
        array = np.asarray(pixels)
        if array.dtype == np.uint8 and array.ndim in (3, 4) and len(array) == len(labels):
            if array.ndim == 3:
                array = array[:, None]
            elif array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
                array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
            if array.shape[1] in (1, 3):
                return ArrayExamples(array, labels, title)
    return ObjectExamples(_Reader(dataset), labels, title)


def _labels(dataset: Any, title: str) -> np.ndarray:
    for field in _LABEL_FIELDS:
        values = getattr(dataset, field, None)
        if values is not None and len(values) == len(dataset):
            break
    else:
        # Most others keep pairs of path and label; the last resort reads every image.
        pairs = getattr(dataset, "_samples", None) or dataset
        values = [pairs[index][1] for index in range(len(dataset))]
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(f"{title}: its targets are not one class a image, so it is no classification set.")
    return array.astype(np.int64)


class _Reader:
    """Read the image, without its target, of a torchvision set (a class, so that worker processes can receive it)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        return self.dataset[index][0]
