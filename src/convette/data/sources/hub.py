"""`hub:NAME`: a set of the Hugging Face hub, by its name there; ``?config=NAME`` where it has several of them."""

import os

from convette.data._examples import RawData
from convette.data.sources.folder import SPLIT_NAMES
from convette.data.sources.parquet import find_columns, from_tables
from convette.errors import DataError


def read(target: str, options: dict[str, str]) -> RawData:
    """Download the set (or take it from the cache of `datasets`) and find its splits, columns and class names."""
    # Nothing phones home: read once by the hub's client when it is first imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import DatasetDict, load_dataset

    try:
        found = load_dataset(target, options.get("config"))
    except Exception as error:  # the client raises its own, requests' and httpx' errors for the same trouble
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"hub:{target} cannot be loaded ({first}). Check the name and the connection; offline, only sets loaded "
            "before are there, or use parquet:PATH with downloaded files."
        ) from error
    if not isinstance(found, DatasetDict):
        raise DataError(f"hub:{target} is not a set with splits.")
    by_name = {str(name): table for name, table in found.items()}
    tables = {SPLIT_NAMES[name.lower()]: table for name, table in by_name.items() if name.lower() in SPLIT_NAMES}
    if "train" not in tables:
        raise DataError(f"hub:{target} has no split named train (it has {', '.join(by_name)}).")
    others = [name for name in by_name if name.lower() not in SPLIT_NAMES]
    schemas = {name: table.data.schema for name, table in tables.items()}
    title = f"hub:{target}"
    columns = find_columns(schemas, options, title)
    raw = from_tables(tables, schemas["train"], columns, title, files=True)
    notes = (f"{title}: splits not read: {', '.join(others)}",) if others else ()
    return RawData(raw.class_names, raw.splits, (*raw.notes, *notes))
