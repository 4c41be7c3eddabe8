"""The errors convette raises: one line that says what is wrong, where, and what would work.

Each class carries the exit code the command line ends with.
"""

import difflib
from collections.abc import Iterable


class ConvetteError(Exception):
    """Base of every error convette raises on purpose; its text is one line meant for the user."""

    exit_code = 1


class UsageError(ConvetteError):
    """A name, key, option or file the user gave cannot be used."""

    exit_code = 2


class DataError(ConvetteError):
    """The data cannot be read, or too much of it is bad."""

    exit_code = 3


class BudgetError(ConvetteError):
    """The budget cannot be reached; the text names the smallest cost that can."""

    exit_code = 4


class InterruptedRun(ConvetteError):
    """The run was stopped from outside and can be resumed by the same command."""

    exit_code = 5


class FileFormatError(UsageError):
    """A model file is damaged, tampered with, or not one of ours."""


class StructureError(ConvetteError):
    """An edit of the network's structure cannot be carried out; the network is left as it was."""


class TrainingError(ConvetteError):
    """Training cannot go on (a loss that is not finite, ranks that drifted apart)."""


class StorageError(ConvetteError):
    """Writing failed (disk full, no permission); what was there before is intact."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option nearest to `word`, or all options if few, or nothing."""
    options = sorted(set(options))
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    if 0 < len(options) <= 32:
        return " Known: " + ", ".join(options) + "."
    return ""
