"""``convette split``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def split(
    at: Annotated[str, typer.Option("--at", help="The stage that becomes a bottleneck, such as layer1.")],
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME, FILE.safetensors or a run folder.")
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    features: Annotated[
        str | None, typer.Option("--features", help="Later stages to reproduce too, with commas: layer2,layer3.")
    ] = None,
    bottleneck: Annotated[int, typer.Option("--bottleneck", min=1, help="Channels that cross.")] = 3,
    width: Annotated[int, typer.Option("--width", min=1, help="Width of its encoder and decoder.")] = 16,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Passes over the training images.")] = 8,
    rate: Annotated[float, typer.Option("--rate", help="Bytes a second of the loopback link.")] = 1e5,
    latency: Annotated[float, typer.Option("--latency", help="Seconds each way of the link.")] = 0.005,
    filter_class: Annotated[
        str | None,
        typer.Option("--filter", help="The class of images that hold nothing: answered on the device, not sent."),
    ] = None,
    recall: Annotated[
        float, typer.Option("--recall", help="Share of the other validation images that the filter passes.")
    ] = 0.99,
    jpeg: Annotated[
        int | None, typer.Option("--jpeg", help="Also send whole images, as JPEG of this quality (1 to 95).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for head.onnx, tail.onnx and filter.onnx.")] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Split a network between device and server at a trained bottleneck, and time it over a shaped loopback link."""
    from convette.pipeline.edge import split_network
    from convette.pipeline.inspect import open_model, required_name

    with results(json) as show:
        network = open_model(required_name(name, model), weights=weights, pretrained=pretrained)
        done = split_network(
            network,
            data or "digits",
            at,
            features=[part.strip() for part in (features or "").split(",") if part.strip()],
            channels=bottleneck,
            width=width,
            epochs=epochs,
            rate=rate,
            latency=latency,
            filter_class=filter_class,
            recall=recall,
            jpeg=jpeg,
            out=out,
        )
        show(done.to_json(), done.text())
