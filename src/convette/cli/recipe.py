"""``convette recipe``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def recipe(
    file: Annotated[Path | None, typer.Argument(help="A recipe to check and complete; else the defaults.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Print a recipe with every key, or the JSON schema of recipes."""
    import json as json_module

    from convette.pipeline.fit import as_recipe
    from convette.pipeline.recipe import Recipe

    with results(json) as show:
        if schema:
            value = Recipe.model_json_schema()
            show(value, json_module.dumps(value, indent=2))
        else:
            whole = as_recipe(file, o.overrides(set_))
            show(whole.tables(), whole.to_toml().rstrip())
