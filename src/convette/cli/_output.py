"""What verbs print: tables for people, or one JSON object and nothing else."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def results(as_json: bool) -> Iterator[Callable[..., None]]:
    """Yield ``show(value, text)``: prints `text` (a string or rich renderable), or with `as_json` the `value`.

    While a verb works towards JSON, whatever libraries print goes to standard error, so that a program can read the
    object from standard output.
    """
    if not as_json:
        yield lambda value, text: _print(text)
        return
    shown: list[Any] = []
    with _stdout_to_stderr():
        yield lambda value, text: shown.append(value)
    for value in shown:
        print(json.dumps(value, indent=2, allow_nan=False))


def _print(text: Any) -> None:
    if isinstance(text, str):
        print(text)
    else:
        from rich.console import Console

        console = Console()
        # A pipe has no width; rich would fold columns at 80.
        Console(width=None if console.is_terminal else 160).print(text)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        # Native libraries write to the file descriptor itself.
        try:
            stdout, stderr = sys.__stdout__.fileno(), sys.stderr.fileno()  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError):
            yield
            return
        kept = os.dup(stdout)
        try:
            os.dup2(stderr, stdout)
            yield
        finally:
            os.dup2(kept, stdout)
            os.close(kept)
