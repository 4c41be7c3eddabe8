"""What the shared switches set: quiet, debug."""

from convette import _progress

debug = False


def set_debug(value: bool) -> bool:
    """Remember whether errors show their traceback."""
    global debug
    debug = value
    return value


def set_quiet(value: bool) -> bool:
    """Switch progress and notes off."""
    _progress.set_quiet(value)
    return value
