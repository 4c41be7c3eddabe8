"""The options that verbs share, spelled alike everywhere; each names the recipe key that it sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from convette.cli import _state
from convette.errors import UsageError

_SOURCES = ("digits", "folder:", "parquet:", "hub:", "torchvision:CIFAR10", "torchvision:MNIST")


def _complete_source(incomplete: str) -> list[str]:
    return [source for source in _SOURCES if source.startswith(incomplete)]


Source = Annotated[
    str | None,
    typer.Argument(
        help="Data (digits, folder:PATH, parquet:PATH, hub:NAME, torchvision:NAME) or a recipe (.toml). (data.source)",
        autocompletion=_complete_source,
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, folder:PATH, parquet:PATH, hub:NAME or torchvision:NAME. (data.source)",
        autocompletion=_complete_source,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="resnet20 ..., timm:NAME, torchvision:NAME, module:callable or FILE.safetensors. (model.name)"
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Tensors for a named network: .safetensors or .pt. (model.weights)")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from the published weights. (model.pretrained)")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help='Limits, such as "macs<=40%, latency<=2ms@openvino:cpu". [budget.limits]'),
]
Contention = Annotated[
    int | None,
    typer.Option(
        "--contention", min=0, max=64, help="Background processes while latency is measured. (run.contention)"
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training images. (train.epochs)")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe; options given beside it go over it.")]
Convert = Annotated[
    list[str] | None,
    typer.Option(
        "--convert",
        metavar="[LAYER=]BY[;KEY=VALUE]",
        help='Convert layers: "BatchNorm2d=bnet; where=last in block; k=5", "weight-align". [convert]',
    ),
]
TrainMethod = Annotated[
    list[str] | None,
    typer.Option(
        "--method", metavar="NAME[;KEY=VALUE]", help='Train with a method: "norm-loss; weight=0.01". [method]'
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random. (run.seed)")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:0. (run.device)")]
RunOut = Annotated[Path | None, typer.Option("--out", help="The run folder. (run.out)")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what an earlier run left in the folder.")]
MaxBad = Annotated[
    str | None, typer.Option("--max-bad", help="Share of unusable images to put up with: 1% or 0.01. (data.max_bad)")
]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Channel means on the scale 0..1: 0.5 or 0.49,0.48,0.45. (data.mean)")
]
Std = Annotated[str | None, typer.Option("--std", help="Channel standard deviations, likewise. (data.std)")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the recipe: --set train.batch_size=64."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_state.set_quiet, help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_state.set_debug, help="Show the traceback of an error.")]


def overrides(pairs: list[str] | None, /, **values: Any) -> dict[str, Any]:
    """Return recipe keys and values from options (``train__epochs=3`` is ``train.epochs``) and ``--set`` pairs."""
    from convette.pipeline._toml import parse_value

    found = {key.replace("__", "."): value for key, value in values.items() if value is not None and value is not False}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or "." not in key:
            raise UsageError(f"--set {pair!r}: write section.key=value, such as train.batch_size=64.")
        found[key.strip()] = parse_value(text.strip())
    return found


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers in ``"0.5,0.4,0.3"``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: write numbers with commas, such as 0.5,0.4,0.3.") from None


def share(option: str, text: str | None) -> float | None:
    """Return a share written as ``1%`` or ``0.01``."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} {text!r}: write a share, such as 1% or 0.01.") from None


def recipe_of(source: str | None, recipe: Path | None, values: Mapping[str, Any]) -> Any:
    """Return the recipe of a verb: a file as first argument or as ``--recipe``, the other options over it."""
    from convette.pipeline.fit import as_recipe

    values = dict(values)
    if source is not None and source.endswith(".toml"):
        if recipe is not None:
            raise UsageError(f"two recipes were given, {source} and {recipe}; keep one.")
        recipe = Path(source)
    elif source is not None:
        values["data.source"] = source
    return as_recipe(recipe, values)
