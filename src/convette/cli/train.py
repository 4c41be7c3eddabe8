"""``convette train``."""

from convette.cli import _options as o
from convette.cli._output import results


def train(
    source: o.Source = None,
    model: o.Model = None,
    epochs: o.Epochs = None,
    recipe: o.RecipeFile = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    convert: o.Convert = None,
    method: o.TrainMethod = None,
    mean: o.Mean = None,
    std: o.Std = None,
    max_bad: o.MaxBad = None,
    seed: o.Seed = None,
    device: o.Device = None,
    out: o.RunOut = None,
    restart: o.Restart = False,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train a network and score it on the test split; also under torchrun, in as many processes as it starts.

    The same command again goes on where it was stopped.
    """
    from convette.pipeline.fit import describe, train_run
    from convette.training import distributed

    values = o.overrides(
        set_,
        convert=convert or None,
        method=method or None,
        model__name=model,
        train__epochs=epochs,
        model__weights=weights,
        model__pretrained=pretrained,
        data__mean=o.numbers("--mean", mean),
        data__std=o.numbers("--std", std),
        data__max_bad=o.share("--max-bad", max_bad),
        run__seed=seed,
        run__device=device,
    )
    with results(json) as show:
        result = train_run(o.recipe_of(source, recipe, values), out=out, restart=restart)
        if distributed.is_main():
            show(result.to_json(), describe(result))
        distributed.finish_distributed()
