"""``convette catalogue``."""

from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def catalogue(
    room: Annotated[
        list[str] | None, typer.Option("--room", help="Only this room; may be given several times.")
    ] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only planned, or only works.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """List the published systems that this library is for, and which of them work."""
    from dataclasses import asdict

    from rich.table import Table

    from convette._catalogue import catalogue as read_catalogue

    rooms = dict.fromkeys(room or [None])
    systems = [system for name in rooms for system in read_catalogue(room=name, state=state)]
    table = Table(title=f"{len(systems)} systems")
    for column in ("room", "slug", "name", "kind", "year", "arXiv", "state"):
        table.add_column(column)
    for system in systems:
        table.add_row(
            system.room, system.slug, system.name, system.kind, str(system.year), system.arxiv or "", system.state
        )
    with results(json) as show:
        show({"systems": [asdict(system) for system in systems]}, table)
