"""``convette cost``."""

from typing import Annotated, Any

import typer

from convette.cli import _options as o
from convette.cli._output import results


def cost(
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME, FILE.safetensors or a run folder.")
    ] = None,
    model: o.Model = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", help="Where to measure latency: eager, compiled, onnxruntime, openvino:cpu:bf16 ..."),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--engines", help="all: every engine and precision in turns, and which to use; or names with commas."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Images for int8 with --engines: digits, folder:PATH ...; else random.")
    ] = None,
    contention: Annotated[
        str | None,
        typer.Option("--contention", help="Background processes while measuring: 1, or 0,1,2 to compare conditions."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", help="Another network to compare under --contention.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Where the network can be cut for edge and server, and what crosses there.")
    ] = False,
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
    from convette.pipeline.inspect import (
        cost_of,
        cost_report,
        file_bytes,
        input_of,
        open_model,
        required_name,
        shipped_files,
    )
    from convette.pipeline.latency_study import conditions_of, cuts_of, engine_report, study_of, survey_of

    def opened(which: str, taking: int | None) -> Any:
        return open_model(which, weights=weights, pretrained=pretrained, num_classes=classes, in_channels=taking)

    with results(json) as show:
        name = required_name(name, model)
        network = opened(name, channels)
        levels = conditions_of(contention)
        if len(levels) > 1 or against:
            # What is compared gets the input of the first.
            taking = channels or input_of(network).channels
            networks = {name: network, **{other: opened(other, taking) for other in against or []}}
            report, text = study_of(networks, levels, tuple(engine or ()), batch_size=batch_size, image_size=image_size)
            show(report, text)
            return 0
        if split:
            show(*cuts_of(network, image_size=image_size))
            return 0
        survey, load = None, next(iter(levels)).processes
        if engines is not None and not no_latency:
            survey = survey_of(network, engines, data=data, batch_size=batch_size, image_size=image_size, load=load)
        measured = () if no_latency or (survey and not engine) else tuple(engine) if engine else None
        found, statuses = cost_of(
            network,
            measured,
            batch_size=batch_size,
            image_size=image_size,
            budget=budget,
            load=load,
            files=shipped_files(name),
        )
        file = file_bytes(name)
        report = found.to_json() | ({"engines": survey.to_json()} if survey else {})
        report |= {"file": file} if file is not None else {}
        show(report, engine_report(cost_report(found, statuses, file), survey))
    return 0 if all(status.met for status in statuses) else 4
