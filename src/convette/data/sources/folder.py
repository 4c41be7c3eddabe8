"""`folder:PATH`: image files, one folder a class; with or without folders train, val and test above."""

import os
import stat
from pathlib import Path

import numpy as np

from convette.data._examples import FileExamples, RawData
from convette.errors import DataError, UsageError, did_you_mean

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# Left by file managers; nobody means them as images.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "icon\r"})


def read(target: str, options: dict[str, str]) -> RawData:
    """Find the classes and the image files of a folder; class names in alphabetical order."""
    root = existing_path(target, "folder")
    if not root.is_dir():
        raise UsageError(f"folder:{target} is a file; give the folder that holds one folder for each class.")
    folders = _subfolders(root)
    found = _split_folders(root, folders)
    if not found:
        class_names = _class_names(root)
        return RawData(class_names, {"train": _read_split(root, root, class_names)})
    others = [folder.name for folder in folders if folder not in found.values()]
    if "train" not in found:
        there = ", ".join(folder.name for folder in found.values())
        beside = f" (beside it: {', '.join(others)})" if others else ""
        raise DataError(f"{root}: has {there} but no folder named train{beside}; rename or add it.")
    class_names = _class_names(found["train"])
    for name, folder in found.items():
        if name != "train":
            _check_classes(folder, found["train"], class_names)
    splits = {name: _read_split(root, folder, class_names) for name, folder in found.items()}
    notes = (f"{root}: folders beside the splits are not read: {', '.join(others)}",) if others else ()
    return RawData(class_names, dict(splits), notes)


def _split_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    # "train" may also be a class (beside "bus"): then it holds images, not folders. Where nothing but splits is there,
    # folders without classes are a mistake, which is told later.
    if len(named) < len(folders):
        named = [folder for folder in named if _subfolders(folder)]
    found = {SPLIT_NAMES[folder.name.lower()]: folder for folder in named}
    if len(found) < len(named):
        names = ", ".join(folder.name for folder in named)
        raise DataError(f"{root}: holds two folders for one split ({names}); keep one of them.")
    return found


def existing_path(target: str, kind: str) -> Path:
    """Return `target` as a path; raise `UsageError` with the nearest name in its parent if nothing is there."""
    path = Path(target).expanduser()
    if not target:
        raise UsageError(f"{kind}: names no path; write {kind}:PATH.")
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"{kind}:{target} does not exist.{did_you_mean(path.name, beside)}")
    return path


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(entry.name for entry in _subfolders(folder))
    if not names:
        raise DataError(f"{folder}: has no class folders; put the images of each class into a folder named after it.")
    return names


def _check_classes(folder: Path, train: Path, class_names: tuple[str, ...]) -> None:
    there = _class_names(folder)
    for name in there:
        if name not in class_names:
            raise DataError(
                f"{folder / name}: no class of this name in {train}.{did_you_mean(name, class_names)} "
                "Rename it or add the class to the training images."
            )
    missing = [name for name in class_names if name not in there]
    if missing:
        raise DataError(
            f"{folder}: has no folder for class {missing[0]!r} ({len(missing)} of {len(class_names)} classes missing); "
            "add it (it may be empty)."
        )


def _read_split(root: Path, folder: Path, class_names: tuple[str, ...]) -> FileExamples:
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _files_below(folder / name)
        files += [os.path.relpath(path, root) for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return FileExamples(root, files, np.asarray(labels, dtype=np.int64), sizes)


def _files_below(folder: Path) -> list[tuple[str, int]]:
    """Return all files below, with their sizes, in an order that does not depend on the file system."""
    found: list[tuple[str, int]] = []
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _LITTER:
                path = os.path.join(directory, name)
                try:
                    status = os.stat(path)
                except OSError:  # a dangling link: kept, to be named among the bad
                    found.append((path, 0))
                    continue
                if stat.S_ISREG(status.st_mode):  # opening a pipe or a device could block for ever
                    found.append((path, status.st_size))
    return found
