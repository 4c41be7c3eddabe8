"""``convette show``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def show(
    file: Annotated[Path, typer.Argument(help="A network (.safetensors, .onnx, .xml) or a run folder.")],
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Say what is in a file: where the network came from, its edits, history and card; or how a run went."""
    from convette.pipeline.show import describe_path

    with results(json) as print_result:
        value, text = describe_path(file)
        print_result(value, text)
