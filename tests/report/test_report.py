"""The report holds what the run left, refers to nothing outside itself, and escapes what it shows."""

import base64
import html.parser
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.report.made_run import STAGES, make_run

from convette.errors import UsageError
from convette.pipeline.results import CompressResult, PathPoint, Width
from convette.report import render_report, write_report
from convette.report._writer import _trade_off, percent, shown_widths


class Page(html.parser.HTMLParser):
    """Collects references, ids, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.sections: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[key] for key in ("src", "href", "srcset", "data", "action") if key in values]
        if tag == "section":
            self.sections.append(values["id"])
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    return parsed


def test_a_finished_run_shows_everything_and_needs_nothing_outside(tmp_path: Path):
    path = write_report(make_run(tmp_path))
    text = path.read_text(encoding="utf-8")
    page = read(text)
    assert page.sections == [
        "result",
        "training",
        "structure",
        "latency",
        "precision",
        "mistakes",
        "explanations",
        "files",
        "data",
        "reproduce",
    ]
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"@import|url\(|https?://", text)
    for shown in (
        "97.78 %",
        "−0.83 points",
        "40 % of it",
        "verified",
        "int8 is not faster here.",
        "layer3.2",
        "convette fit --recipe recipe.toml",
    ):
        assert shown in page.text, shown


def test_pictures_and_charts_are_what_they_say(tmp_path: Path):
    import io

    from PIL import Image

    page = read(render_report(make_run(tmp_path)))
    kinds = [reference.split(";")[0] for reference in page.references]
    assert kinds.count("data:image/svg+xml") == 5
    pngs = [r for r in page.references if r.startswith("data:image/png")]
    assert len(pngs) == 10 + 3 + 3 * 4
    first = Image.open(io.BytesIO(base64.b64decode(pngs[0].split(",")[1])))
    assert first.size == (96, 96)


def test_names_from_the_data_are_escaped(tmp_path: Path):
    text = render_report(make_run(tmp_path))
    assert "<b>zero" not in text and "<x>" not in text
    assert "&lt;b&gt;zero&lt;/b&gt;" in text


@pytest.mark.parametrize("finished", range(len(STAGES)))
def test_an_interrupted_run_has_a_report_too(tmp_path: Path, finished: int):
    page = read(render_report(make_run(tmp_path, finished)))
    assert f"Not finished: {finished} of {len(STAGES)}" in page.text


def test_the_same_run_gives_the_same_report(tmp_path: Path):
    make_run(tmp_path)
    assert render_report(tmp_path) == render_report(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_deep_networks_show_the_layers_that_lost_most_in_network_order():
    rows = [Width(layer=f"l{i}", before=200, after=200 - i % 80) for i in range(160)]
    shown = shown_widths(rows)
    assert len(shown) == 60
    assert [rows.index(row) for row in shown] == sorted(rows.index(row) for row in shown)
    assert min(row.before - row.after for row in shown) >= 50


def test_percentages_keep_what_matters():
    assert [percent(x) for x in (1.0, 0.9778, 0.5, 0.1234)] == ["100 %", "97.78 %", "50 %", "12.34 %"]


def test_a_latency_that_was_measured_once_is_no_path(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "convette.report._charts.accuracy_against_cost", lambda path, metric, bound: drawn.append(metric)
    )
    limit = SimpleNamespace(metric="latency.p50@openvino:cpu", bound=1.0)
    for latencies in ((None, 0.9), (2.0, 0.9)):
        path = [PathPoint(step=i, macs=9 - i, parameters=9, size=9, latency=x) for i, x in enumerate(latencies)]
        path = [point.model_copy(update={"accuracy": 0.5}) for point in path]
        _trade_off(CompressResult.model_construct(limits=[limit], path=path))
    assert drawn == ["macs", "latency"]


def test_few_bits_without_candidates_have_no_empty_table(tmp_path: Path):
    run = make_run(tmp_path)
    assert ">candidate<" in render_report(run)
    result = run / "quantize/result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "candidates": []}))
    assert ">candidate<" not in render_report(run) and "Kept: <strong>" in render_report(run)
