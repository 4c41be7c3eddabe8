"""Where images come from: one file a kind of source, each with ``read(target, options) -> RawData``."""

import importlib
from pathlib import Path

from convette.data._examples import RawData
from convette.errors import UsageError, did_you_mean

# Kind -> (module, whether a target follows the colon).
SOURCES = {
    "digits": ("convette.data.sources.digits", False),
    "folder": ("convette.data.sources.folder", True),
    "parquet": ("convette.data.sources.parquet", True),
    "hub": ("convette.data.sources.hub", True),
    "torchvision": ("convette.data.sources.torchvision", True),
}


def read_source(source: str) -> RawData:
    """Find the images of ``KIND:TARGET`` or ``KIND:TARGET?key=value&key=value``; nothing is decoded yet."""
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        raise UsageError(f"unknown data source {source!r}.{_remedy(source, kind)}")
    module, has_target = SOURCES[kind]
    target, options = _options(rest)
    if has_target and not target:
        raise UsageError(
            f"data source {source!r} names nothing; write {kind}:{'PATH' if kind in ('folder', 'parquet') else 'NAME'}."
        )
    if not has_target and rest:
        raise UsageError(f"data source {kind!r} takes nothing after the colon, got {rest!r}.")
    return importlib.import_module(module).read(target, options)


def _options(rest: str) -> tuple[str, dict[str, str]]:
    """Split off ``?key=value&...``; a path that exists with the question mark in it is left alone."""
    target, mark, query = rest.partition("?")
    if not mark or Path(rest).exists():
        return rest, {}
    options = {}
    for item in query.split("&"):
        key, equals, value = item.partition("=")
        known = ("image", "label", "config", "root")
        if not equals or key not in known:
            raise UsageError(f"data source option {item!r}: expected key=value.{did_you_mean(key, known)}")
        options[key] = value
    return target, options


def _remedy(source: str, kind: str) -> str:
    path = Path(source or "?").expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return f" For this file write parquet:{source}"
    if path.is_dir():
        return f" For this folder write {'parquet' if list(path.glob('*.parquet')) else 'folder'}:{source}"
    hint = did_you_mean(kind, SOURCES)
    return hint if "Did" in hint else hint + " For example folder:PATH."
