"""The catalogue: every published system of the library, whether it works yet, and where to find it."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from convette.errors import UsageError, did_you_mean

STATES = ("planned", "works")


@dataclass(frozen=True)
class System:
    """One published system.

    `symbol` (``"module:name"``), `docs` (a page under ``docs/``) and `evidence` (a result file under
    ``benchmarks/evidence/results/``) are set exactly when `state` is ``"works"``.
    """

    slug: str
    room: str
    name: str
    title: str
    first_author: str
    year: int
    kind: str
    state: str
    arxiv: str | None = None
    symbol: str | None = None
    docs: str | None = None
    evidence: str | None = None


def catalogue(room: str | None = None, state: str | None = None) -> tuple[System, ...]:
    """Return the systems in the order of the catalogue file, all or those of one `room` and one `state`.

    Raises `UsageError` for a room or state the catalogue does not have.
    """
    systems = _read()
    rooms = {system.room for system in systems}
    if room is not None and room not in rooms:
        raise UsageError(f"room {room!r} is not in the catalogue.{did_you_mean(room, rooms)}")
    if state is not None and state not in STATES:
        raise UsageError(f"state {state!r} is none of the catalogue's.{did_you_mean(state, STATES)}")
    return tuple(s for s in systems if room in (None, s.room) and state in (None, s.state))


@cache
def _read() -> tuple[System, ...]:
    text = resources.files("convette").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return tuple(System(**row) for row in tomllib.loads(text)["system"])
