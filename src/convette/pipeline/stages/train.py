"""Stage train: from the start to the trained network that everything later is compared with."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from convette.pipeline._run import MODEL_FILE, Run, Stage
from convette.pipeline.conversion import training_methods
from convette.pipeline.recipe import settings_json
from convette.pipeline.results import Epoch, Scores, TrainingResult
from convette.training import EpochRecord, Evaluation, evaluate, train


def train_network(run: Run, folder: Path) -> TrainingResult:
    """Train the start on the training split; validation picks nothing, it is only looked at."""
    settings = run.recipe.train
    model = run.network("model")
    result = train(
        model,
        run.data,
        settings,
        methods=training_methods(run.recipe, model, run.data),
        device=run.device,
        checkpoint_dir=run.folder.checkpoints("train"),
        log_dir=run.folder.logs("train"),
        title="train",
    )
    run.save(result.model, folder / MODEL_FILE)
    return TrainingResult(
        settings=settings_json(settings),
        device=str(run.device),
        epochs=epochs_of(result.history),
        validation=validate(run, result.model),
    )


def validate(run: Run, model: nn.Module) -> Scores:
    """Return what `model` reaches on the validation split."""
    return scores_of(evaluate(model, run.data.validation, run.data.preprocessing, device=run.device))


def scores_of(evaluation: Evaluation) -> Scores:
    """Return the figures of an evaluation, with its confusion matrix."""
    return Scores(
        images=len(evaluation.labels),
        accuracy=evaluation.accuracy,
        loss=evaluation.loss,
        calibration_error=evaluation.calibration_error,
        confusion=evaluation.confusion.tolist(),
    )


def epochs_of(history: Iterable[EpochRecord]) -> list[Epoch]:
    """Return the records of a training as the run folder keeps them, numbered from 1."""
    return [
        Epoch(
            epoch=number,
            train_loss=record.train_loss,
            train_accuracy=record.train_accuracy,
            validation_loss=record.validation_loss,
            validation_accuracy=record.validation_accuracy,
            learning_rate=record.learning_rate,
            seconds=record.seconds,
        )
        for number, record in enumerate(history, start=1)
    ]


STAGE = Stage("train", train_network, on_all_ranks=True)
