"""``convette quantize``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results
from convette.cli.prune import one_name


def quantize(
    out: Annotated[
        Path, typer.Option("--out", help="The file to write: NAME.safetensors (few bits), .onnx or .xml (int8).")
    ],
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME or FILE.safetensors. (model.name)")
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help='Size of the file: "size<=30KB"; bits of each layer follow. [budget.limits]'),
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", min=2, max=8, help="Of weights. (quantize.bits)")] = None,
    activation_bits: Annotated[
        int | None, typer.Option("--activation-bits", help="2 to 8; 0: float. (quantize.activation_bits)")
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option("--observer", help="min_max, percentile, mse or entropy. (quantize.observer)"),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="Training images to learn from. (quantize.calibration_images)")
    ] = None,
    recipe: o.RecipeFile = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = None,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a trained network in few bits (2 to 8 a weight) or, for an engine, in int8; no labels are needed."""
    from convette.pipeline.quantizing import quantize_file

    values = o.overrides(
        set_,
        data__source=data,
        model__name=one_name(name, model),
        budget__limits=budget,
        quantize__bits=bits,
        quantize__activation_bits=activation_bits,
        quantize__observer=observer,
        quantize__calibration_images=images,
        model__weights=weights,
        model__pretrained=pretrained,
        data__mean=o.numbers("--mean", mean),
        data__std=o.numbers("--std", std),
        run__seed=seed,
    )
    if observer in ("mse", "entropy"):
        # What OpenVINO's quantiser does not offer; a file for it is then refused by name.
        values.setdefault("quantize.engines", ("onnxruntime:cpu",))
    with results(json) as show:
        done = quantize_file(o.recipe_of(None, recipe, values), out)
        show(
            done.to_json(),
            f"{done.file}: {done.bytes:,} bytes; {done.text}\n"
            f"test accuracy {100 * done.accuracy_before:.2f} % before, {100 * done.accuracy_after:.2f} % after; "
            f"{done.seconds:.0f} s",
        )
