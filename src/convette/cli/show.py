"""``convette show``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def show(
    file: Annotated[
        Path, typer.Argument(help="A network (.safetensors, .onnx, .xml) or a run folder; with --units any model name.")
    ],
    units: Annotated[
        bool, typer.Option("--units", help="Which channels go together, and what fixes the rest.")
    ] = False,
    picture: Annotated[Path | None, typer.Option("--out", help="With --units: draw them to this .svg file.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Say what is in a file: where the network came from, its edits, history and card; or how a run went."""
    from convette.errors import UsageError
    from convette.pipeline.show import describe_path

    if picture is not None and not units:
        raise UsageError("--out draws the units: give --units too.")
    with results(json) as print_result:
        if units:
            from convette.pipeline.inspect import open_model, units_of

            print_result(*units_of(open_model(str(file)), picture))
            return
        value, text = describe_path(file)
        print_result(value, text)
