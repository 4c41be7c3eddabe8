"""Hypothesis draws the same examples in every run, so that a change is what makes a test fail.

``HYPOTHESIS_PROFILE=explore make unit`` draws new ones.
"""

import os

import pytest
from hypothesis import settings

from convette import _progress

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def notes_are_heard():
    """A test that calls the command line's app by itself with --quiet leaves no later one without notes."""
    yield
    _progress.set_quiet(False)
