"""Every row of the catalogue is well-formed, and every "works" row keeps its promise."""

import importlib
import json
from pathlib import Path

import pytest

from convette._catalogue import STATES, catalogue
from convette.errors import UsageError

ROOT = Path(__file__).parent.parent
WORKING = catalogue(state="works")


def test_slugs_are_unique_and_the_fields_well_formed():
    systems = catalogue()
    assert len(systems) == 120
    assert len({(s.room, s.slug) for s in systems}) == len(systems)
    for system in systems:
        assert system.state in STATES
        assert 1990 < system.year < 2030
        assert system.arxiv is None or (len(system.arxiv) == 10 and system.arxiv[4] == ".")
        promised = (system.symbol, system.docs, system.evidence)
        assert all(promised) if system.state == "works" else not any(promised), system.slug


def test_filters_and_their_errors():
    assert {s.room for s in catalogue(room="layers")} == {"layers"}
    assert len(catalogue(state="planned")) + len(catalogue(state="works")) == 120
    with pytest.raises(UsageError, match="Did you mean 'pruning'"):
        catalogue(room="prunning")
    with pytest.raises(UsageError, match="planned, works"):
        catalogue(state="x")


@pytest.mark.parametrize("system", WORKING, ids=lambda s: s.slug)
def test_a_working_system_keeps_its_promise(system):
    module, name = system.symbol.split(":")
    symbol = getattr(importlib.import_module(module), name)
    assert symbol.__doc__ and (
        system.arxiv is None
        or system.arxiv in (importlib.import_module(symbol.__module__).__doc__ or "") + symbol.__doc__
    )
    page = (ROOT / "docs" / system.docs).read_text()
    assert system.docs in (ROOT / "mkdocs.yml").read_text()
    assert system.name in page
    evidence = json.loads((ROOT / "benchmarks/evidence/results" / system.evidence).read_text())
    for key in ("command", "machine", "versions", "seconds"):
        assert evidence[key], key
