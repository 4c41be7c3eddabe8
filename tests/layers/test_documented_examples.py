"""The examples of the docs pages of the layers run."""

import re
from pathlib import Path

import pytest
import torch

PAGES = sorted((Path(__file__).parents[2] / "docs/systems/layers").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_example(page):
    torch.manual_seed(0)
    text = page.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for marker in ("card", "price", "evidence"):
        assert f"<!-- {marker}: {page.stem} -->" in text
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
