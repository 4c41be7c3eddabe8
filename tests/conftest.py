"""Hypothesis draws the same examples in every run, so that a change is what makes a test fail.

``HYPOTHESIS_PROFILE=explore make unit`` draws new ones.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
