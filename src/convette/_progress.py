"""Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Switch all progress output and notes of this process off (or on again)."""
    global _quiet
    _quiet = quiet


def note(text: str) -> None:
    """Print one plain line for the user on standard error, unless quiet."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: float | int, unit: str = "step") -> Iterator[Callable[..., None]]:
    """Show progress through `total` units of work.

    Yields ``advance(count=1, detail="")``: `detail` is a short text shown beside the bar. Nothing is shown for work
    that ends within two seconds. On a terminal: a rich bar with rate and remaining time. Elsewhere: a line about every
    ten seconds.
    """
    if _quiet:
        yield lambda count=1, detail="": None
    elif sys.stderr.isatty():
        with _terminal_bar(title, total, unit) as advance:
            yield advance
    else:
        yield _plain_lines(title, total, unit)


@contextlib.contextmanager
def _terminal_bar(title: str, total: float | int, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=total, rate="", detail="", visible=False)
    start, done = time.monotonic(), 0.0

    def advance(count: float | int = 1, detail: str = "") -> None:
        nonlocal done
        done += count
        elapsed = time.monotonic() - start
        bar.update(
            task, advance=count, visible=elapsed > 2, rate=f"{done / max(elapsed, 1e-9):.1f} {unit}/s", detail=detail
        )

    with bar:
        yield advance


def _plain_lines(title: str, total: float | int, unit: str) -> Callable[..., None]:
    start = last = time.monotonic()
    done = 0.0

    def advance(count: float | int = 1, detail: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate if rate > 0 else 0
            note(f"{title}: {done:g}/{total:g} {unit}s, {rate:.1f} {unit}/s, {left:.0f} s left {detail}".rstrip())

    return advance
