"""Stage quantize: try int8 and the float precisions, and keep the one that pays; or write the network in few bits."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from convette._progress import note
from convette.cost import count
from convette.layers.quantization.deployed import quantized_layers
from convette.layers.quantization.edits import pack_layers
from convette.pipeline._latency import threads_beside
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.conversion import deployed
from convette.pipeline.few_bits import images_of, rounded, tried_text
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import Candidate, CompressResult, QuantizationResult, read_result
from convette.quantization import QuantizeResult, QuantizeSettings, choose, quantize
from convette.quantization.low_bit_limited_data import describe
from convette.runtime import EngineSpec, contention
from convette.training import evaluate


def quantize_network(run: Run, folder: Path) -> QuantizationResult:
    """Measure the precisions on the engines and keep the int8 file if it is faster and accurate enough."""
    network = run.network(run.final_stage())
    if quantized_layers(network):
        return pack_trained(run, network, folder)
    if run.few_bits:
        return low_bit_network(run, folder)
    model, _ = deployed(network, run.example)
    load = run.recipe.run.contention
    with contention(load):
        result = quantize(model, run.data, run.recipe.quantize, out=folder, threads=threads_beside(load))
    result = on_named_engine(result, run.named_engine, run.recipe.quantize)
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


def on_named_engine(result: QuantizeResult, named: EngineSpec | None, settings: QuantizeSettings) -> QuantizeResult:
    """Return `result` with what is best on the engine that the budget names, in the precision it names, if it does."""
    those = [one for one in result.candidates if named and EngineSpec.parse(one.name).engine == named.engine]
    if named is not None and named.precision in ("fp32", "bf16"):
        those = [one for one in those if one.precision == named.precision]
        kept, reason = (those[0].name, f"{those[0].name} is kept.") if those else (result.kept, result.reason)
    elif any(one.precision == "fp32" for one in those):
        kept, reason = choose(those, settings)
    else:
        return result
    if kept == result.kept:
        return result
    return replace(
        result, kept=kept, reason=f"{reason} Files for other engines are no choice: the budget names {named}."
    )


def pack_trained(run: Run, network: nn.Module, folder: Path) -> QuantizationResult:
    """Pack a network that was trained with rounding: it computes the same, in few bits on the disk."""
    layers = [layer.bits for layer in quantized_layers(network).values()]
    counts = ", ".join(f"{layers.count(bits)} layers in {bits} bits" for bits in sorted(set(layers)))
    reason = f"trained with rounding: {counts}; nothing is left to quantise."
    run.save(pack_layers(network), folder / MODEL_FILE)
    note(f"quantize: {reason}")
    return QuantizationResult(
        candidates=[], failures=[], kept="low_bit", precision=f"int{min(layers)}", reason=reason, file=None
    )


def low_bit_network(run: Run, folder: Path) -> QuantizationResult:
    """Write the network in few bits, distilled on a few training images, within the budget's size if it has one."""
    parent = run.network(run.final_stage())
    result = rounded(run, parent, images_of(run), count(run.network("train"), run.example))
    before, after = (
        evaluate(network, run.data.validation, run.data.preprocessing).accuracy for network in (parent, result.model)
    )
    run.save(result.model, folder / MODEL_FILE)
    compressed: CompressResult | None = read_result(run.path, "compress")
    reason = (
        f"{describe(result)}; {100 * after:.2f} % right on the validation split, {100 * before:.2f} % before, "
        f"distilled on {run.recipe.quantize.calibration_images} images."
        f"{tried_text(compressed.tried) if compressed else ''}"
    )
    note(f"quantize: {reason}")
    widths = sorted(set(result.bits.values()))
    return QuantizationResult(
        candidates=[], failures=[], kept="low_bit", precision=f"int{widths[0]}", reason=reason, file=None
    )


def _left_out(recipe: Recipe) -> str | None:
    return "quantize.mode is off" if recipe.quantize.mode == "off" else None


STAGE = Stage("quantize", quantize_network, _left_out)
