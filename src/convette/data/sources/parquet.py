"""`parquet:PATH`: Parquet files in the layout of the `datasets` library's Image feature.

PATH is one file, or a folder with train-*.parquet and, if there are, validation-*.parquet and test-*.parquet (also
one folder further down, in data/). ``?image=COLUMN&label=COLUMN`` names the columns where they are not found.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convette.data._examples import NO_LABEL, ArrowExamples, Examples, RawData
from convette.data.sources.folder import SPLIT_NAMES, existing_path
from convette.errors import DataError, UsageError, did_you_mean

_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "image_bytes", "bytes")
_LABEL_NAMES = ("label", "labels", "target", "class", "cls", "y", "fine_label", "class_label", "category")
# Above this many bytes on disk the file is converted once to a memory-mapped Arrow file instead of being read whole.
MAPPED_ABOVE = 4 * 1024**3


def read(target: str, options: dict[str, str]) -> RawData:
    """Find splits, columns and class names; encoded images stay encoded (in memory, or mapped if there are many)."""
    path = existing_path(target, "parquet")
    files = _split_files(path)
    schemas = {name: _schema(paths[0]) for name, paths in files.items()}
    columns = find_columns(schemas, options, str(path))
    tables = {name: _load(paths, columns) for name, paths in files.items()}
    return from_tables(tables, schemas["train"], columns, str(path), files=False)


def find_columns(schemas: dict[str, Any], options: dict[str, str], title: str) -> tuple[str, str]:
    """Return the image and the label column of the training split, which every split must have."""
    features = _features(schemas["train"])
    image = _image_column(schemas["train"], features, options.get("image"), title)
    label = _label_column(schemas["train"], features, options.get("label"), image, title)
    for name, schema in schemas.items():
        for column in (image, label):
            if column not in schema.names:
                raise DataError(f"{title}: split {name!r} has no column {column!r} ({_columns(schema)}).")
    return image, label


def from_tables(tables: dict[str, Any], schema: Any, columns: tuple[str, str], title: str, *, files: bool) -> RawData:
    """Turn Arrow tables (or `datasets.Dataset`), one a split, into examples with common class names.

    `files` says whether a row without bytes may name an image file of this machine.
    """
    image, label = columns
    raw = {name: getattr(table, "data", table).column(label) for name, table in tables.items()}
    declared = _declared_names(schema, _features(schema), label)
    class_names, labels = _labels(raw, declared, f"{title}: column {label!r}")
    notes: list[str] = []
    splits: dict[str, Examples] = {}
    for name, table in tables.items():
        if name != "train" and (labels[name] == NO_LABEL).all():
            notes.append(f"{title}: split {name!r} has no labels and is left out")
            continue
        splits[name] = ArrowExamples(table, image, labels[name], f"{title} {name}", files)
    return RawData(class_names, splits, tuple(notes))


def _split_files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"train": [path]}
    found = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not found:
        raise DataError(f"{path}: holds no *.parquet file; expected train-*.parquet (and test-*.parquet).")
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in found:
        word = re.split(r"[-_.]", file.name.lower())[0]
        if word in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[word], []).append(file)
        else:
            others.append(file)
    if not splits:
        return {"train": others}
    if others:
        hint = did_you_mean(re.split(r"[-_.]", others[0].name)[0], ("train", "validation", "test"))
        raise DataError(f"{others[0]}: its name begins with no split.{hint} Rename or remove it.")
    if "train" not in splits:
        raise DataError(f"{path}: has {', '.join(sorted(splits))} but no train-*.parquet.")
    for files in splits.values():
        _check_shards(files)
    return splits


def _check_shards(files: list[Path]) -> None:
    matches = [re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name) for file in files]
    numbers = {int(match[1]) for match in matches if match}
    totals = {int(match[2]) for match in matches if match}
    if len(totals) == 1 and (missing := set(range(total := totals.pop())) - numbers):
        raise DataError(f"{files[0].parent}: shard {min(missing)} of {total} like {files[0].name} is missing.")


def _schema(file: Path) -> Any:
    import pyarrow.parquet as pq

    with _parquet_errors(file):
        return pq.read_schema(file)


def _load(files: list[Path], columns: tuple[str, str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _parquet_errors(files[0]):
        if sum(file.stat().st_size for file in files) > MAPPED_ABOVE:
            from datasets import Dataset

            return Dataset.from_parquet([str(file) for file in files], columns=list(columns))
        tables = [pq.read_table(file, columns=list(columns)).replace_schema_metadata(None) for file in files]
        return pa.concat_tables(tables)


@contextlib.contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0][:160]
        raise DataError(f"{file}: cannot be read as Parquet ({first}).") from error


def _columns(schema: Any) -> str:
    return "columns: " + ", ".join(f"{field.name} ({_short(str(field.type))})" for field in schema)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _features(schema: Any) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)} if features else {}


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind[place].name == "bytes" for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _chosen(schema: Any, name: str, title: str) -> str:
    if name not in schema.names:
        raise UsageError(f"{title}: has no column {name!r}.{did_you_mean(name, schema.names)}")
    return name


def _image_column(schema: Any, features: dict[str, Any], chosen: str | None, title: str) -> str:
    if chosen is not None:
        return _chosen(schema, chosen, title)
    able = [field.name for field in schema if _has_bytes(field.type)]
    declared = [name for name in able if features.get(name, {}).get("_type") == "Image"]
    for names in (declared, able):
        by_name = [name for name in _IMAGE_NAMES if name in {found.lower() for found in names}]
        if by_name:
            return next(name for name in names if name.lower() == by_name[0])
        if len(names) == 1:
            return names[0]
    raise DataError(f"{title}: no column of encoded images found ({_columns(schema)}); name it with ?image=COLUMN.")


def _label_column(schema: Any, features: dict[str, Any], chosen: str | None, image: str, title: str) -> str:
    if chosen is not None:
        return _chosen(schema, chosen, title)
    able = [field.name for field in schema if field.name != image and _is_label(field.type)]
    declared = [name for name in able if features.get(name, {}).get("_type") == "ClassLabel"]
    for names in (declared, able):
        by_name = [name for name in _LABEL_NAMES if name in {found.lower() for found in names}]
        if by_name:
            return next(name for name in names if name.lower() == by_name[0])
    if len(declared) == 1:
        return declared[0]
    raise DataError(f"{title}: no label column found ({_columns(schema)}); name it with ?label=COLUMN.")


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    )


def _declared_names(schema: Any, features: dict[str, Any], label: str) -> list[str] | None:
    names = features.get(label, {}).get("names")
    if not names:
        try:
            names = json.loads((schema.metadata or {}).get(b"class_names", b"null"))
        except ValueError:
            names = None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _labels(
    columns: dict[str, Any], declared: list[str] | None, where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names and int64 labels; without declared names the sorted values of the column are the classes."""
    values = {name: column.to_pylist() for name, column in columns.items()}
    known = [value for rows in values.values() for value in rows if value is not None and value != NO_LABEL]
    if not known:
        raise DataError(f"{where}: holds no label.")
    kinds = {type(value) for value in known}
    if kinds - {int, bool, str} or len(kinds) > 1:
        raise DataError(
            f"{where}: labels are {'/'.join(sorted(kind.__name__ for kind in kinds))}, expected integers or names."
        )
    if declared is not None and kinds == {int}:
        if max(known) >= len(declared) or min(known) < 0:
            wrong = max(known) if max(known) >= len(declared) else min(known)
            raise DataError(f"{where}: label {wrong} has no name; the file names {len(declared)} classes.")
        index: dict[Any, int] = {number: number for number in range(len(declared))}
    else:
        present = sorted(set(known))
        if declared is not None and set(present) <= set(declared):
            present = declared
        index = {value: number for number, value in enumerate(present)}
        declared = [str(value) for value in present]
    labels = {
        name: np.asarray([index.get(value, NO_LABEL) for value in rows], dtype=np.int64)
        for name, rows in values.items()
    }
    return tuple(declared), labels
