"""Stage quantize: try int8 and the float precisions, and keep the one that pays."""

from pathlib import Path

from convette._progress import note
from convette.pipeline._run import Run, Stage
from convette.pipeline.conversion import deployed
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import Candidate, QuantizationResult
from convette.quantization import quantize


def quantize_network(run: Run, folder: Path) -> QuantizationResult:
    """Measure the precisions on the engines and keep the int8 file if it is faster and accurate enough."""
    model, _ = deployed(run.network(run.final_stage()), run.example)
    result = quantize(model, run.data, run.recipe.quantize, out=folder)
    note(f"quantize: {result.reason}")
    return QuantizationResult(
        candidates=[
            Candidate(
                name=one.name,
                engine=one.name,
                precision=one.precision,
                accuracy=one.accuracy,
                latency=one.latency.p50,
                size=one.size,
                file=one.path.name,
                note=f"computed in {one.precision}",
            )
            for one in result.candidates
        ],
        failures=list(result.failures),
        kept=result.kept,
        precision=result.chosen.precision,
        reason=result.reason,
        file=result.chosen.path.name if result.quantized else None,
    )


def _left_out(recipe: Recipe) -> str | None:
    return "quantize.mode is off" if recipe.quantize.mode == "off" else None


STAGE = Stage("quantize", quantize_network, _left_out)
