"""``convette prune``."""

from pathlib import Path
from typing import Annotated

import typer

from convette.cli import _options as o
from convette.cli._output import results


def prune(
    name: Annotated[
        str | None, typer.Argument(help="resnet20 ..., timm:NAME, torchvision:NAME or FILE.safetensors. (model.name)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write: NAME.safetensors; else MODEL-pruned.safetensors.")
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    budget: o.BudgetOption = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs of recovery, over all steps. (prune.epochs)")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="l1, taylor, fisher, discriminant_information ...; --set prune.criterion_options.NAME=VALUE."
            " (prune.criterion)",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="global, uniform, exact, evolution ...; --set prune.allocation_options.NAME=VALUE. (prune.allocation)",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="iterative, gradual, growing, soft; n2n, block_then_channel. (prune.schedule)"),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option("--blocks", help="Share of the blocks that may be left out: 25%. (prune.blocks)")
    ] = None,
    blocks_by: Annotated[
        str | None, typer.Option("--blocks-by", help="Which go first: loss or information. (prune.blocks_by)")
    ] = None,
    redistribute: Annotated[
        bool | None,
        typer.Option("--redistribute/--no-redistribute", help="Least-squares repair of each cut. (prune.redistribute)"),
    ] = None,
    recalibrate: Annotated[
        bool | None,
        typer.Option("--recalibrate/--no-recalibrate", help="Batch-norm statistics anew. (prune.recalibrate)"),
    ] = None,
    distil: Annotated[
        bool | None, typer.Option("--distil/--no-distil", help="The unpruned network teaches. (prune.distil)")
    ] = None,
    distil_from: Annotated[
        str | None, typer.Option("--distil-from", help="logits, features or in_place. (prune.distil_from)")
    ] = None,
    constraints: Annotated[
        str | None,
        typer.Option("--constraints", help='Such as "multiple_of=8, minimum=16, keep stem*". (prune.constraints)'),
    ] = None,
    recipe: o.RecipeFile = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    mean: o.Mean = None,
    std: o.Std = None,
    max_bad: o.MaxBad = None,
    contention: o.Contention = None,
    seed: o.Seed = None,
    device: o.Device = None,
    set_: o.Set = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Remove channels of a network until it fits a budget, and recover its accuracy by training.

    With --epochs 0 no data is needed: the network is only cut.
    """
    from convette.pipeline.from_example import prune_from_example
    from convette.pipeline.single import check_prune, prune_file
    from convette.training import distributed

    values = o.overrides(
        set_,
        data__source=data,
        model__name=one_name(name, model),
        budget__limits=budget,
        prune__epochs=epochs,
        prune__criterion=criterion,
        prune__allocation=allocation,
        prune__schedule=schedule,
        prune__blocks=o.share("--blocks", blocks),
        prune__blocks_by=blocks_by,
        prune__distil_from=distil_from,
        prune__constraints=constraints,
        model__weights=weights,
        model__pretrained=pretrained,
        data__mean=o.numbers("--mean", mean),
        data__std=o.numbers("--std", std),
        data__max_bad=o.share("--max-bad", max_bad),
        run__contention=contention,
        run__seed=seed,
        run__device=device,
    )
    switches = {"redistribute": redistribute, "recalibrate": recalibrate, "distil": distil}
    values |= {f"prune.{name}": value for name, value in switches.items() if value is not None}
    with results(json) as show:
        wanted = o.recipe_of(None, recipe, values)
        file = out or Path(f"{Path(wanted.model.name.rpartition(':')[2]).stem}-pruned.safetensors")
        check_prune(wanted, file)
        without_data = recipe is None and not any(key.startswith("data.") for key in values) and not wanted.prune.epochs
        done = (prune_from_example if without_data else prune_file)(wanted, file)
        text = f"{done.file}: {done.text}\n"
        if done.accuracy_before is not None and done.accuracy_after is not None:
            text += (
                f"test accuracy {100 * done.accuracy_before:.2f} % before, {100 * done.accuracy_after:.2f} % after; "
            )
        text += f"{done.seconds:.0f} s"
        if distributed.is_main():
            show(done.to_json(), text)
        distributed.finish_distributed()


def one_name(argument: str | None, option: str | None) -> str | None:
    """Return the network that was named, as argument or as ``--model``; raises `UsageError` for two."""
    from convette.errors import UsageError

    if argument is not None and option is not None:
        raise UsageError(f"two networks were given, {argument} and {option}; keep one.")
    return argument or option
