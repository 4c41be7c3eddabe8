"""Quantise one network into a file, without a run folder: in few bits, or in int8 for an engine."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convette import models
from convette.cost import Budget, count
from convette.data import ImageData
from convette.errors import UsageError
from convette.layers.quantization.deployed import quantized_layers
from convette.layers.quantization.edits import quantizable
from convette.pipeline.few_bits import calibration_images, within_limit
from convette.pipeline.inspect import check_network
from convette.pipeline.recipe import Recipe
from convette.pipeline.single import load_recipe_data, open_recipe_model
from convette.pipeline.stages.model import put_card
from convette.quantization import quantize_onnx, quantize_openvino
from convette.quantization.low_bit_limited_data import layers_text
from convette.runtime import export, exported_size, prepare
from convette.training import evaluate, evaluate_runner

SUFFIXES = {".safetensors": None, ".onnx": "onnxruntime:cpu", ".xml": "openvino:cpu"}


@dataclass(frozen=True)
class QuantizeOutcome:
    """A network quantised into `file`: its bytes, and the accuracy on the test split before and of the file itself."""

    file: str
    bytes: int
    accuracy_before: float
    accuracy_after: float
    text: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def quantize_file(recipe: Recipe, out: Path | str) -> QuantizeOutcome:
    """Quantise the network of `recipe` into `out` and score that file, once, on the test split.

    ``.safetensors``: few bits, packed, within the budget's size if it has one (`convette.quantization.low_bit`).
    ``.onnx``, ``.xml``: int8 with the recipe's observer; few bits too where ``quantize.bits`` is given. Raises
    `UsageError` for another suffix, a budget on anything but size, or no network.
    """
    out, started = Path(out), time.monotonic()
    check_quantize(recipe, out)
    data = load_recipe_data(recipe)
    section = recipe.model
    model = open_recipe_model(recipe, data, "quantize")
    data = put_card(model, data, keep_normalisation=recipe.data.mean is not None)
    calibration = calibration_images(data, recipe.quantize)
    check_network(model, section.name, calibration[:1], data.num_classes)
    if quantized_layers(model) and not quantizable(model):
        raise UsageError(f"{section.name} is in few bits already; quantise the network it was made of.")
    before = evaluate(model, data.test, data.preprocessing).accuracy
    engine = SUFFIXES[out.suffix]
    if engine is None or recipe.quantize.bits is not None or recipe.quantize.method == "low_bit":
        text, after = _few_bits(recipe, model, data, calibration, out)
    else:
        text, after = _int8(recipe, model, data, calibration, out)
    size = out.stat().st_size if engine is None else exported_size(out)
    return QuantizeOutcome(str(out), size, before, after, text, round(time.monotonic() - started, 1))


def check_quantize(recipe: Recipe, out: Path) -> None:
    """Raise `UsageError` where `recipe` lacks, or asks for more than, what quantising into the file `out` needs."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: .safetensors (few bits), .onnx or .xml (int8) can be written.")
    if recipe.model.name == "auto":
        raise UsageError("quantize needs a network: --model NAME with --weights FILE, or FILE.safetensors.")
    name = Path(recipe.model.name)
    if name.suffix in (".onnx", ".xml", ".bin"):
        raise UsageError(
            f"{name} is a file for an engine; quantize needs the network it was made of: NAME.safetensors."
        )
    if out.exists() and name.exists() and out.samefile(name):
        raise UsageError(f"--out {out} is the network itself, which would be lost; name another file.")
    limits = Budget.parse(recipe.budget.limits).limits if recipe.budget.limits else ()
    if any(limit.metric != "size" for limit in limits) or (limits and out.suffix != ".safetensors"):
        raise UsageError(
            f'budget "{recipe.budget.limits}": quantize keeps a limit on the size of a .safetensors file, such as '
            '"size<=30KB"; other limits are for fit and prune.'
        )


def _few_bits(recipe: Recipe, model: nn.Module, data: ImageData, calibration: Tensor, out: Path) -> tuple[str, float]:
    budget = Budget.parse(recipe.budget.limits) if recipe.budget.limits else None
    result = within_limit(model, calibration, recipe.quantize, budget, count(model, calibration[:1]))
    text = f"{layers_text(result)}, weights {result.float_size / result.size:.1f} times smaller"
    if out.suffix == ".safetensors":
        models.save(result.model, out)
        return text, evaluate(models.load(out), data.test, data.preprocessing).accuracy
    export(result.model, calibration[:1], out)
    return text, _accuracy(out, data, calibration)


def _int8(recipe: Recipe, model: nn.Module, data: ImageData, calibration: Tensor, out: Path) -> tuple[str, float]:
    observer = None if recipe.quantize.observer == "default" else recipe.quantize.observer
    batches = list(calibration.split(32))
    if out.suffix == ".xml":
        quantize_openvino(model, calibration[:1], batches, out, observer=observer)
    else:
        with tempfile.TemporaryDirectory(prefix="convette-") as folder:
            plain = export(model, calibration[:1], Path(folder) / "model.onnx")
            quantize_onnx(plain, batches, out, observer=observer)
    return f"int8, ranges by {observer or 'the default'}", _accuracy(out, data, calibration)


def _accuracy(out: Path, data: ImageData, calibration: Tensor) -> float:
    with prepare(f"{SUFFIXES[out.suffix]}:int8", out, calibration[:1]) as runner:
        return evaluate_runner(runner, data.test, data.preprocessing).accuracy
