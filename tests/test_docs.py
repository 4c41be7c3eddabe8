"""The documentation builds without a warning: every page in its place, every docstring readable, every link alive."""

import subprocess
import sys
from pathlib import Path

from convette._catalogue import catalogue

ROOT = Path(__file__).parent.parent


def test_the_site_builds_strictly_with_a_page_for_every_working_system(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for system in catalogue(state="works"):
        assert system.docs is not None
        assert (tmp_path / system.docs.removesuffix(".md") / "index.html").exists()
