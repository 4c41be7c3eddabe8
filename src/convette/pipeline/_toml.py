"""TOML with places: which line holds a key, so that an error about a value can point at it."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convette.errors import UsageError

_HEADER = re.compile(r"^\s*\[\[?([^\[\]]+)\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_PART = re.compile(r"[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'")


def read_toml(path: Path | str) -> tuple[dict[str, Any], str]:
    """Return the tables of a TOML file and its text. Raises `UsageError` with file and line where it is not TOML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text; a recipe is a TOML file.") from error
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        if found:
            raise UsageError(f"{path}, line {found[2]}, column {found[3]}: {_plain(found[1])}.") from error
        raise UsageError(f"{path}: {_plain(str(error))}.") from error


def line_of(text: str, key: Sequence[str]) -> int | None:
    """Return the 1-based line of `text` where the dotted `key` is set, or the deepest table that leads to it.

    Tables of a list (``[[convert]]``) are numbered from 0: ``("convert", "1", "by")``.
    """
    best: tuple[int, int] | None = None
    table: list[str] = []
    counted: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        header = _HEADER.match(line)
        if header:
            table = _parts(header[1])
            if line.lstrip().startswith("[["):
                counted[header[1]] = counted.get(header[1], -1) + 1
                table = [*table, str(counted[header[1]])]
            here = table
        elif assignment := _KEY.match(line):
            here = table + _parts(assignment[1])
        else:
            continue
        if list(key[: len(here)]) == here and (best is None or len(here) > best[0]):
            best = (len(here), number)
    return best[1] if best else None


def parse_value(text: str) -> Any:
    """Return the value of a ``--set section.key=value`` option: TOML where it is TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in _PART.findall(dotted)]


def _plain(message: str) -> str:
    return "not valid TOML: " + message[:1].lower() + message[1:]
