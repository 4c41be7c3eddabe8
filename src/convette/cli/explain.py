"""``convette explain``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def explain(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="FILE.safetensors, or a name with --weights.")],
    image: Annotated[Path, typer.Argument(help="The image to look at.")],
    out: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("cam.png"),
    method: Annotated[str, typer.Option("--method", help="eigen_cam or grad_cam.")] = "eigen_cam",
    class_index: Annotated[
        int | None, typer.Option("--class", help="Class to explain (grad_cam); by default the predicted one.")
    ] = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Layer to look at, by name.")] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw where a network looks in an image."""
    from convette.pipeline.inspect import explain_image, open_model

    with results(json) as show:
        network = open_model(name, weights=weights, pretrained=pretrained)
        done = explain_image(network, image, out, method=method, class_index=class_index, layer=layer)
        text = (
            f"{image}: {done.name} ({done.confidence:.1%}); {done.method} at {done.layer} ({done.reason}): {done.file}"
        )
        show(done.to_json(), text)
