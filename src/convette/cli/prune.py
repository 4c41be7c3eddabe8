"""``convette prune``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def prune(
    out: Annotated[Path, typer.Option("--out", help="The file to write: NAME.safetensors.")],
    model: o.Model = None,
    data: o.Data = None,
    budget: o.BudgetOption = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs of recovery, over all steps. (prune.epochs)")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option("--criterion", help="l1, l2, taylor, bn_scale, lamp or random. (prune.criterion)")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option("--allocation", help="global, uniform or per_layer. (prune.allocation)")
    ] = None,
    recipe: o.RecipeFile = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    mean: o.Mean = None,
    std: o.Std = None,
    max_bad: o.MaxBad = None,
    seed: o.Seed = None,
    device: o.Device = None,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Remove channels of a network until it fits a budget, and recover its accuracy by training."""
    from convette.pipeline.single import prune_file
    from convette.training import distributed

    values = o.overrides(
        set_,
        data__source=data,
        model__name=model,
        budget__limits=budget,
        prune__epochs=epochs,
        prune__criterion=criterion,
        prune__allocation=allocation,
        model__weights=weights,
        model__pretrained=pretrained,
        data__mean=o.numbers("--mean", mean),
        data__std=o.numbers("--std", std),
        data__max_bad=o.share("--max-bad", max_bad),
        run__seed=seed,
        run__device=device,
    )
    with results(json) as show:
        done = prune_file(o.recipe_of(None, recipe, values), out)
        text = (
            f"{done.file}: {done.text}\ntest accuracy {100 * done.accuracy_before:.2f} % before, "
            f"{100 * done.accuracy_after:.2f} % after; {done.seconds:.0f} s"
        )
        if distributed.is_main():
            show(done.to_json(), text)
        distributed.finish_distributed()
