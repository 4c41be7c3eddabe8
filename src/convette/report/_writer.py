"""From a run folder to `report.html`: reads the stages' results, draws, fills the template."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from convette import _files
from convette.cost import Cost, format_bytes, format_count, format_milliseconds
from convette.pipeline.results import (
    CompressResult,
    DataResult,
    ExplainResult,
    Row,
    RunRecord,
    VerifyResult,
    Width,
    read_result,
    read_run,
)
from convette.report import _charts
from convette.report._pictures import picture

REPORT_FILE = "report.html"


def write_report(run_dir: Path | str) -> Path:
    """Write the report of the run in `run_dir` to ``report.html`` there, whole or not at all, and return its path.

    Shows whatever stages have finished: an interrupted run has a report too. Raises `UsageError` if the folder is no
    run, `StorageError` if the file cannot be written.
    """
    path = Path(run_dir) / REPORT_FILE
    _files.write_text(path, render_report(run_dir))
    return path


def render_report(run_dir: Path | str) -> str:
    """Return the report of the run in `run_dir` as one HTML page that refers to nothing outside itself."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    run_dir = Path(run_dir)
    environment = Environment(
        loader=PackageLoader("convette.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=figure,
        change=change,
        count=format_count,
        bytes=format_bytes,
        ms=format_milliseconds,
        percent=percent,
        whole="{:,}".format,
    )
    return environment.get_template("template.html").render(**_context(run_dir))


def _context(run_dir: Path) -> dict:
    run = read_run(run_dir)
    results = {
        stage: read_result(run_dir, stage)
        for stage in ("data", "model", "train", "compress", "quantize", "export", "verify", "explain")
    }
    data, compress, verify, explain = (results[stage] for stage in ("data", "compress", "verify", "explain"))
    names = data.class_names if data else []
    return {
        **results,
        "run": run,
        "style": resources.files("convette.report").joinpath("style.css").read_text(encoding="utf-8"),
        "headline": _headline(run),
        "cards": [row for row in run.summary.rows if row.key in _card_keys(run)] if run.summary else [],
        "names": names,
        "samples": _samples(run_dir, data),
        "curves": _charts.training_curves(results["train"].epochs, compress.recovery if compress else ())
        if results["train"]
        else None,
        "trade_off": _trade_off(compress),
        "widths": _charts.widths(shown_widths(compress.widths)) if compress and compress.widths else None,
        "hidden_widths": len(compress.widths) - len(shown_widths(compress.widths)) if compress else 0,
        "confusion": _charts.confusion(verify.test_after.confusion, names)
        if verify and verify.test_after.confusion
        else None,
        "mistakes": _mistakes(run_dir, verify, names),
        "latency": _latency(verify),
        "latency_rows": _latency_rows(verify),
        "maps": _maps(run_dir, explain, names),
    }


def figure(row: Row, value: float | None) -> str:
    """Return a value of `row` with its unit, or a dash."""
    if value is None:
        return "–"
    formatters = {"share": percent, "count": format_count, "bytes": format_bytes, "ms": format_milliseconds}
    return formatters[row.unit](value)


def percent(value: float) -> str:
    """Return a share as a percentage with two decimals at most."""
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"


def change(row: Row) -> str:
    """Return how `after` compares with `before`: points for shares, a percentage of the start for costs."""
    if row.unit == "share":
        points = 100 * (row.after - row.before)
        return f"{points:+.2f} points".replace("-", "−")
    if not row.before:
        return "–"
    ratio = row.after / row.before
    return f"{100 * ratio:.0f} % of it" if ratio >= 0.1 else f"{100 * ratio:.1f} % of it"


def _card_keys(run: RunRecord) -> list[str]:
    """Accuracy, whatever the budget limits, then MACs, size and the first latency: four at most."""
    rows = run.summary.rows if run.summary else []
    limited = [row.key for row in rows if row.budget is not None]
    usual = ["macs", *[row.key for row in rows if row.key.startswith("latency.p50")][:1], "size", "parameters"]
    return list(dict.fromkeys(["accuracy", *limited, *usual]))[:4]


def _headline(run: RunRecord) -> str:
    if run.summary is None:
        done = sum(stage.state == "finished" for stage in run.stages)
        return f"Not finished: {done} of {len(run.stages)} stages are done. The same command goes on from here."
    if any(row.budget is not None for row in run.summary.rows):
        return "The network fits its budget." if run.summary.met else "The network does not fit its budget."
    return "The network is trained, verified and exported."


def _samples(run_dir: Path, data: DataResult | None) -> list[str]:
    if data is None:
        return []
    with np.load(run_dir / "data" / data.samples) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    first = [int(np.nonzero(labels == label)[0][0]) for label in np.unique(labels)[:12]]
    return [picture(images[index]) for index in first]


def _trade_off(compress: CompressResult | None) -> str | None:
    if compress is None or len(compress.path) < 2:
        return None
    limit = compress.limits[0] if compress.limits else None
    metric = limit.metric.partition(".")[0] if limit else "macs"
    metric = metric if metric in ("macs", "parameters", "size", "latency") else "macs"
    if sum(getattr(point, metric) is not None for point in compress.path) < 2:
        metric = "macs"  # a latency that was measured once makes no path
    usable = any(getattr(point, metric) is not None and point.accuracy is not None for point in compress.path)
    bound = limit.bound if limit and limit.metric.partition(".")[0] == metric else None
    return _charts.accuracy_against_cost(compress.path, metric, bound) if usable else None


def shown_widths(rows: list[Width]) -> list[Width]:
    """Return the layers worth a bar: all, or in deep networks the 60 that lost most, in network order."""
    if len(rows) <= 60:
        return rows
    most = sorted(rows, key=lambda row: row.after - row.before)[:60]
    return [row for row in rows if row in most]


@dataclass(frozen=True)
class Mistake:
    """A picture with what it is and what the network took it for."""

    picture: str
    label: str
    prediction: str
    confidence: float


def _mistakes(run_dir: Path, verify: VerifyResult | None, names: list[str]) -> list[Mistake]:
    if verify is None:
        return []
    with np.load(run_dir / "verify" / verify.mistakes) as arrays:
        rows = zip(arrays["images"], arrays["labels"], arrays["predictions"], arrays["confidences"], strict=True)
        return [Mistake(picture(image), names[label], names[guess], float(sure)) for image, label, guess, sure in rows]


def _latencies(verify: VerifyResult | None) -> dict[str, tuple]:
    """Return engine -> (latency before, latency after) for the engines measured on both."""
    if verify is None:
        return {}
    before, after = (Cost.from_json(cost).latency for cost in (verify.cost_before, verify.cost_after))
    return {engine: (before[engine], after[engine]) for engine in after if engine in before}


def _latency(verify: VerifyResult | None) -> str | None:
    pairs = {
        engine: (before.timings, after.timings)
        for engine, (before, after) in _latencies(verify).items()
        if len(before.timings) and len(after.timings)
    }
    return _charts.latency_distributions(pairs) if pairs else None


def _latency_rows(verify: VerifyResult | None) -> list[dict]:
    return [
        {"engine": engine, "before": before, "after": after, "speedup": before.p50 / after.p50}
        for engine, (before, after) in _latencies(verify).items()
    ]


@dataclass(frozen=True)
class ExplainedPicture:
    """An image with the maps of both networks over it."""

    image: str
    before: str
    after: str
    label: str
    prediction_before: str
    prediction_after: str
    right: bool
    correlation: float


def _maps(run_dir: Path, explain: ExplainResult | None, names: list[str]) -> list[ExplainedPicture]:
    from convette.explain import overlay

    if explain is None:
        return []
    with np.load(run_dir / "explain" / explain.maps) as arrays:
        images, before, after = arrays["images"], arrays["before"], arrays["after"]
    import torch

    def heat(index: int, maps: np.ndarray) -> str:
        return picture(np.asarray(overlay(torch.from_numpy(images[index]), torch.from_numpy(maps[index]))))

    return [
        ExplainedPicture(
            image=picture(images[index]),
            before=heat(index, before),
            after=heat(index, after),
            label=names[row.label],
            prediction_before=names[row.prediction_before],
            prediction_after=names[row.prediction_after],
            right=row.right,
            correlation=row.correlation,
        )
        for index, row in enumerate(explain.images)
    ]
