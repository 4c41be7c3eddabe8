"""``convette export``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write: NAME.onnx or NAME.xml (OpenVINO).")],
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME or FILE.safetensors.")
    ] = None,
    model: o.Model = None,
    to: Annotated[str | None, typer.Option("--to", help="onnx or openvino; by default as the file is named.")] = None,
    data: o.Data = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Side of the images.")] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a network as ONNX or OpenVINO, with preprocessing and class names in the file."""
    from convette.pipeline.inspect import required_name
    from convette.pipeline.single import export_file

    with results(json) as show:
        done = export_file(
            required_name(name, model),
            out,
            to=to,
            weights=weights,
            pretrained=pretrained,
            data=data,
            image_size=image_size,
        )
        checked = done["verified"]
        text = f"{done['file']}: {done['bytes']:,} bytes"
        if checked:
            text += f", same class on {checked['agreement']:.2%} of {checked['images']} images on {checked['engine']}"
        show(done, text)
