"""The Python in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from convette._catalogue import catalogue

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/systems").rglob("*.md"))
SYSTEMS = {system.slug: system for system in catalogue()}
# Rooms whose pages say what a layer costs beside what it replaces.
PRICED = ("layers", "normalization")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.stem not in SYSTEMS
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("slug", [slug for slug, system in SYSTEMS.items() if system.state == "works"])
def test_the_page_of_a_working_system_shows_its_card_its_evidence_and_its_price(slug: str):
    text = (ROOT / "docs" / str(SYSTEMS[slug].docs)).read_text()
    for marker in ("card", "evidence", *(["price"] if SYSTEMS[slug].room in PRICED else [])):
        assert f"<!-- {marker}: {slug} -->" in text
