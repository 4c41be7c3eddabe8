"""The pipeline: recipes, `fit` with its stages and run folder, `compare`."""

from convette.pipeline.compare import Comparison, Evidence, compare, load_evidence, validate_evidence
from convette.pipeline.fit import FitResult, fit, read_outcome, run_recipe, train_run
from convette.pipeline.recipe import Recipe, build_recipe, load_recipe
from convette.pipeline.results import RunRecord, read_result, read_run

__all__ = [
    "Comparison",
    "Evidence",
    "FitResult",
    "Recipe",
    "RunRecord",
    "build_recipe",
    "compare",
    "fit",
    "load_evidence",
    "load_recipe",
    "read_outcome",
    "read_result",
    "read_run",
    "run_recipe",
    "train_run",
    "validate_evidence",
]
