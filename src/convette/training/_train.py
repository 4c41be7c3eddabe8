"""`train`: one call from a network and data to the trained network."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convette.errors import UsageError
from convette.training._fabric import FabricAdapter, resolve_device
from convette.training.checkpoints import CheckpointFolder, random_state, set_random_state
from convette.training.choose import Choice, choose
from convette.training.distributed import barrier, broadcast, is_main
from convette.training.events import Method
from convette.training.loaders import cut_epoch, training_batches, validator
from convette.training.logs import TrainLog
from convette.training.settings import TrainSettings
from convette.training.snapshot import FORMAT
from convette.training.state import EpochRecord, Stage
from convette.training.trainer import Trainer
from convette.training.transform import BatchTransform


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    `model` is the trained network (the averaged weights when EMA is on), in eval mode, contiguous, on the device it
    came from; `seconds` all sittings together; `choice` the precision and memory format and why; `resumed_from` the
    step it went on from, None for a run of one sitting.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    seconds: float
    steps: int
    settings: TrainSettings
    choice: Choice
    resumed_from: int | None = None

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy on the validation split after the last epoch, 0..1; None where there was none."""
        return self.history[-1].validation_accuracy if self.history else None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as JSON types."""
        return {
            "history": [record.to_json() for record in self.history],
            "seconds": self.seconds,
            "steps": self.steps,
            "settings": _jsonable(asdict(self.settings)),
            "choice": self.choice.to_json(),
            "resumed_from": self.resumed_from,
        }


def train(
    model: nn.Module,
    data: Any,
    settings: TrainSettings = TrainSettings(),  # noqa: B008  (frozen)
    *,
    methods: Sequence[Method] = (),
    task: Any = None,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | str | None = None,
    log_dir: Path | str | None = None,
    title: str = "train",
) -> TrainResult:
    """Train `model` in place on ``data.train``, watching ``data.validation``, and return the `TrainResult`.

    - `data`: a `convette.data.ImageData`. `task`: what the loss is; None: classification into its classes.
    - `methods`: plug-ins such as `Distillation`, in any order.
    - `checkpoint_dir`: a checkpoint of everything is written there after each epoch. If it holds one already, the run
      goes on from it, to the same bits on a CPU with one thread; a finished one returns at once.
    - `log_dir`: ``log.csv`` and ``log.jsonl`` are written there.

    The random number generators of the caller are left as they were: the result depends on `model`, `data`, `settings`
    and `methods` alone. Started by torchrun, the processes train together (DDP): each takes its part of every batch, so
    batch norms see ``batch_size / processes`` images. Raises `TrainingError` (loss not finite), `InterruptedRun`
    (SIGINT, SIGTERM), `StorageError` (disk full), `UsageError` (settings that cannot be, a checkpoint of another run).
    """
    target = resolve_device(device)
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    fabric = FabricAdapter(target)
    folder = CheckpointFolder(Path(checkpoint_dir), settings.keep_checkpoints) if checkpoint_dir is not None else None
    header = {"title": title, "settings": _jsonable(asdict(settings)), "data": str(data.fingerprint)}
    found = broadcast(folder.read_latest() if folder is not None and is_main() else None)
    if found is not None:
        _check_header(found[1], header, found[0])
    with _own_random_numbers(settings.seed + fabric.rank, target):
        trainer = _trainer(model, data, settings, methods, task or _classification(data), fabric, found, header)
        trainer.checkpoints = folder
        trainer.title = title
        if log_dir is not None and is_main():
            trainer.log = TrainLog(Path(log_dir), settings.tensorboard)
        try:
            history = trainer.fit()
        finally:
            if trainer.log is not None:
                trainer.log.close()
    state = trainer.state
    if state.ema is not None:
        model.load_state_dict(state.ema.module.state_dict())
    model.to(home, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    _write_card(model, data, settings, history, title)
    barrier()
    return TrainResult(
        model,
        tuple(history),
        state.clock.seconds,
        state.clock.step,
        settings,
        Choice(**trainer.header["choice"]),
        int(found[1]["clock"]["step"]) if found is not None else None,
    )


def _trainer(
    model: nn.Module,
    data: Any,
    settings: TrainSettings,
    methods: Sequence[Method],
    task: Any,
    fabric: FabricAdapter,
    found: tuple[Path, Mapping[str, Any]] | None,
    header: dict[str, Any],
) -> Trainer:
    shares = cut_epoch(len(data.train), settings, fabric.world_size)
    batches = training_batches(data.train, shares, settings, fabric.rank, fabric.world_size)

    def loss(outputs: Any, targets: Any) -> torch.Tensor:
        return task.loss(outputs, targets, float(settings.label_smoothing))

    if found is not None:
        choice = Choice(**found[1]["header"]["choice"])
    else:
        sample = next(iter(batches(0, 0)))
        images, labels = BatchTransform(data.preprocessing, fabric.device)(sample)
        total = settings.epochs * len(data.train) // fabric.world_size
        choice = broadcast(choose(model, images, labels, loss, settings, total_images=total))
    form = choice.torch_memory_format
    fabric = fabric.with_precision(choice.precision)
    plain = BatchTransform(data.preprocessing, fabric.device, None, form)
    stage = Stage(
        "train", settings, shares.steps, shares.images_per_step, batches, validator(data.validation, plain, fabric)
    )
    return Trainer(
        model,
        [stage],
        loss=loss,
        accuracy=_accuracy,
        transform=BatchTransform(data.preprocessing, fabric.device, _augmentation(data, settings), form),
        fabric=fabric,
        methods=methods,
        example=plain(next(iter(data.train.batches(min(2, len(data.train)))))),
        resume=found[1] if found is not None else None,
        header={**header, "choice": choice.to_json()},
        memory_format=form,
    )


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (outputs.argmax(1) == labels).float().mean()


def _augmentation(data: Any, settings: TrainSettings) -> Any:
    if not settings.augmentation:
        return None
    from convette.training.augmentation import build_augmentation, choose_augmentation

    size = data.preprocessing
    names = settings.augmentation
    if names == "auto":
        names = choose_augmentation(size.channels, size.height, size.width, data.class_names)
    return build_augmentation(names, size.channels, size.height, size.width, data.num_classes)


def _classification(data: Any) -> Any:
    from convette.tasks import Classification

    return Classification(data.class_names)


# Settings that do not change what comes out, so a run may go on with others.
_FREE = ("validate_every", "checkpoint_steps", "keep_checkpoints", "tensorboard")


def _check_header(tree: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    if tree.get("format") != FORMAT:
        raise UsageError(f"{path}: a checkpoint of another version of convette; use another checkpoint folder.")
    theirs = tree["header"]
    ours = {"data": header["data"], **{f"train.{key}": value for key, value in header["settings"].items()}}
    before = {"data": theirs["data"], **{f"train.{key}": value for key, value in theirs["settings"].items()}}
    for key, value in ours.items():
        if before.get(key) != value and key.removeprefix("train.") not in _FREE:
            raise UsageError(
                f"{path.parent}: holds a run with {key} = {before.get(key)!r}, not {value!r}; "
                "use another checkpoint folder, or delete it to start anew."
            )


def _jsonable(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    import random

    import numpy

    before = random_state(device)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before, device)


def _write_card(
    model: nn.Module, data: Any, settings: TrainSettings, history: Sequence[EpochRecord], title: str
) -> None:
    from convette import surgery

    last = history[-1]
    figures = {
        "step": title,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "train_loss": last.train_loss,
        "validation_accuracy": last.validation_accuracy,
    }
    card = surgery.card_of(model)
    surgery.set_card(
        model,
        replace(
            card,
            class_names=tuple(data.class_names),
            preprocessing=data.preprocessing.to_json(),
            history=(*card.history, figures),
        ),
    )
