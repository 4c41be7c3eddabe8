"""``convette fit``."""

from convette.cli import _options as o
from convette.cli._output import results


def fit(
    source: o.Source = None,
    model: o.Model = None,
    budget: o.BudgetOption = None,
    epochs: o.Epochs = None,
    recipe: o.RecipeFile = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    convert: o.Convert = None,
    method: o.TrainMethod = None,
    mean: o.Mean = None,
    std: o.Std = None,
    max_bad: o.MaxBad = None,
    contention: o.Contention = None,
    seed: o.Seed = None,
    device: o.Device = None,
    out: o.RunOut = None,
    restart: o.Restart = False,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Train a network that fits a budget; verify, explain, export and report it.

    The same command again goes on where it was stopped.
    """
    from convette.pipeline.fit import describe, run_recipe
    from convette.pipeline.stages import FIT
    from convette.training import distributed

    values = o.overrides(
        set_,
        convert=convert or None,
        method=method or None,
        model__name=model,
        budget__limits=budget,
        train__epochs=epochs,
        model__weights=weights,
        model__pretrained=pretrained,
        data__mean=o.numbers("--mean", mean),
        data__std=o.numbers("--std", std),
        data__max_bad=o.share("--max-bad", max_bad),
        run__contention=contention,
        run__seed=seed,
        run__device=device,
    )
    with results(json) as show:
        result = run_recipe(o.recipe_of(source, recipe, values), FIT, out=out, restart=restart)
        if distributed.is_main():
            show(result.to_json(), describe(result))
        distributed.finish_distributed()
    return 0 if result.met else 4
