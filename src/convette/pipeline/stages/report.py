"""Stage report: the page people read. It is written once more when the run is concluded, with the outcome."""

from pathlib import Path

from convette.pipeline._run import Run, Stage
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import ReportResult
from convette.pipeline.summary import summarise


def report(run: Run, folder: Path) -> ReportResult:
    """Write the outcome into `run.json`, then `report.html` beside it."""
    from convette.report import write_report

    run.folder.conclude(summarise(run.path))
    return ReportResult(file=write_report(run.path).name)


def _left_out(recipe: Recipe) -> str | None:
    return None if recipe.report.enabled else "report.enabled is false"


STAGE = Stage("report", report, _left_out)
