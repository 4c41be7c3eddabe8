"""The examples of the docs pages run."""

import re
from pathlib import Path

import pytest
import torch

STUDIES = {"batch-size"}  # pages about several systems, without an example
PAGES = sorted(
    page for page in (Path(__file__).parents[3] / "docs/systems/normalization").glob("*.md") if page.stem not in STUDIES
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_example(page):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})


def test_every_system_has_its_page():
    assert len(PAGES) == 11
