"""What the shared switches set: quiet, debug."""

import typer

from convette import _progress

debug = False


def set_debug(value: bool) -> bool:
    """Remember whether errors show their traceback."""
    global debug
    debug = value
    return value


def set_quiet(context: typer.Context, value: bool) -> bool:
    """Switch progress and notes off until the command ends, whoever called it."""
    _progress.set_quiet(value)
    context.call_on_close(lambda: _progress.set_quiet(False))
    return value
