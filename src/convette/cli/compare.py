"""``convette compare``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def compare(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPES...", help="A baseline and other recipes, or one evidence file.")
    ],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=2, help="How many seeds; by default 5, or what the file says.")
    ] = None,
    epochs: o.Epochs = None,
    device: o.Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="The result file (.json).")] = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="Folder of the single runs.")] = None,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Run recipes over several seeds on the same work: means, 95 % intervals, paired differences to the first.

    What is finished of an earlier call is not run again.
    """
    from convette.pipeline.compare import compare_files

    values = o.overrides(set_, train__epochs=epochs, run__device=device)
    with results(json) as show:
        done = compare_files(recipes, seeds=seeds, overrides=values, out=out, runs=runs)
        show(done.to_json(), done.table())
