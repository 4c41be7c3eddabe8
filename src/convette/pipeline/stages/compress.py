"""Stage compress: remove channels until the budget holds, the trained network teaching what is left."""

from dataclasses import replace
from pathlib import Path

from convette.cost import Budget, LimitStatus, count
from convette.layers.normalization import end_streams
from convette.pipeline._latency import measurer
from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.few_bits import prune_for_bits
from convette.pipeline.recipe import Recipe, settings_json
from convette.pipeline.results import CompressResult, LimitResult, PathPoint, Width
from convette.pipeline.stages.train import epochs_of, validate
from convette.pruning import PruneResult, StepRecord, prune
from convette.training import TrainSettings


def compress(run: Run, folder: Path) -> CompressResult:
    """Prune the trained network to the budget and write the smaller one."""
    assert run.budget is not None
    # What the training did with a clean half of each batch, recovery does not do.
    parent = end_streams(run.network("train"))

    def prune_to(budget: Budget, checkpoints: Path) -> PruneResult:
        return prune(
            parent,
            run.data,
            budget,
            run.recipe.prune,
            train_settings=recovery_settings(run.recipe.train, run.recipe.prune.epochs),
            measure=measurer(budget, run.recipe.run.contention),
            checkpoint_dir=checkpoints,
            device=run.device,
        )

    tried = []
    if run.bits_tried:
        result, tried = prune_for_bits(run, count(parent, run.example), prune_to)
    else:
        result = prune_to(run.budget, run.folder.checkpoints("compress"))
    run.save(result.model, folder / MODEL_FILE)
    return CompressResult(
        budget=str(run.budget),
        settings=settings_json(run.recipe.prune),
        path=[path_point(record, run.budget.engines) for record in result.steps],
        widths=[Width(layer=layer, before=before, after=after) for layer, (before, after) in result.widths.items()],
        recovery=epochs_of(result.recovery),
        validation_before=validate(run, parent),
        validation_after=validate(run, result.model),
        limits=[limit_result(status) for status in result.statuses],
        tried=tried,
    )


def recovery_settings(train: TrainSettings, epochs: int) -> TrainSettings:
    """Return how to train for `epochs` after a cut: as before, but gently, because the weights that are left are good.

    Half the peak learning rate where there is time to settle again, a fifth in a short recovery: in three epochs of
    ResNet-56 on CIFAR-10 half of it lost six points of validation that a fifth kept.
    """
    peak = train.peak_learning_rate(train.batch_size * train.accumulate)
    return replace(train, learning_rate=peak / (2 if epochs >= 10 else 5), warmup_epochs=0.2, label_smoothing=0.0)


def limit_result(status: LimitStatus) -> LimitResult:
    """Return how a limit was kept, as the run folder keeps it."""
    limit = status.limit
    return LimitResult(
        limit=str(limit), metric=limit.key, engine=limit.engine, value=status.value, bound=limit.value, met=status.met
    )


def path_point(record: StepRecord, engines: tuple[str, ...]) -> PathPoint:
    """Return a step of pruning as the run folder keeps it; latency on the first of `engines` that was measured."""
    engine = next((name for name in engines if name in record.cost.latency), None)
    return PathPoint(
        step=record.step,
        macs=record.cost.macs,
        parameters=record.cost.parameters,
        size=record.cost.size,
        latency=record.cost.latency[engine].p50 if engine else None,
        engine=engine,
        accuracy=record.accuracy,
        accuracy_before_recovery=record.accuracy_before_recovery,
    )


def _left_out(recipe: Recipe) -> str | None:
    return None if recipe.budget.limits else "no budget was given"


STAGE = Stage("compress", compress, _left_out, on_all_ranks=True)
