"""The Python in the documentation runs as it stands."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from convette._catalogue import catalogue

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/systems").rglob("*.md"))
SYSTEMS = {system.slug: system for system in catalogue()}
# Rooms whose pages say what a layer, or a cut, costs beside what it replaces: from a result file or in words.
PRICED = ("layers", "normalization")
PRICED_IN_WORDS = ("pruning", "quantization", "runtime")


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
    if SYSTEMS[slug].room in PRICED_IN_WORDS:
        assert any(words in text for words in (f"<!-- price: {slug} -->", "## Price", "**Price.**"))


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("documentation_hooks", ROOT / "docs/_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_price_of_pruning_is_read_from_the_result_file(hooks, tmp_path, monkeypatch):
    prices = {
        "linear_redundancy": {"seconds": 3.0, "step": 2.0},
        "grad_change": {"seconds": 1.0, "step": 4.0},
        "progressive_gradient_pruning": {"seconds": 0.5, "step": 2.0},
    }
    (tmp_path / "prices.json").write_text(json.dumps({"prices": prices, "machine": "a machine"}))
    rows = {"baseline": ["1 %", "17"], "method": ["2 %", "23"]}
    (tmp_path / "linear-redundancy.json").write_text(
        json.dumps({"columns": ["accuracy", "seconds a run"], "rows": rows})
    )
    monkeypatch.setattr(hooks, "CUTS", tmp_path / "prices.json")
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    both = hooks._price("linear-redundancy")
    assert "1.5 training steps" in both and "took 23 s, and 17 s" in both and "a machine" in both
    method = hooks._price("progressive-gradient-pruning")
    assert "`grad_change`" in method and "0.25 training steps" in method and "adds 25 % to a step" in method
    assert "not measured" in hooks._price("yolov3-block-channel")
    assert "2 of" in hooks._price("criteria") and "(`grad_change`) to 1.5 (`linear_redundancy`)" in hooks._price(
        "criteria"
    )


def test_the_names_the_hook_knows_criteria_by_are_criteria(hooks):
    from convette.pruning import CRITERIA

    assert set(hooks.CRITERIA.values()) <= set(CRITERIA) and set(hooks.CRITERIA) <= set(SYSTEMS)
