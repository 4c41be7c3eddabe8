"""``convette cost``."""

from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def cost(
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME or FILE.safetensors.")
    ] = None,
    model: o.Model = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", help="Where to measure latency: eager, compiled, onnxruntime, openvino:cpu:bf16 ..."),
    ] = None,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Only count.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")] = 1,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Side of the images.")] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Outputs of a named network.")] = None,
    channels: Annotated[int | None, typer.Option("--channels", min=1, help="Channels of the images.")] = None,
    budget: o.BudgetOption = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Count what a network costs, layer by layer and in total, and measure its latency here."""
    from convette.pipeline.inspect import cost_of, cost_report, open_model, required_name

    with results(json) as show:
        network = open_model(
            required_name(name, model),
            weights=weights,
            pretrained=pretrained,
            num_classes=classes,
            in_channels=channels,
        )
        engines = () if no_latency else tuple(engine) if engine else None
        found, statuses = cost_of(network, engines, batch_size=batch_size, image_size=image_size, budget=budget)
        show(found.to_json(), cost_report(found, statuses))
    return 0 if all(status.met for status in statuses) else 4
