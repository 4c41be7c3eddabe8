"""Single jobs on one network, without a run folder: prune it into a file, export it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convette import data as data_room
from convette import models, surgery
from convette._progress import note, set_quiet
from convette.cost import Budget, status_text
from convette.data import ImageData
from convette.errors import ConvetteError, UsageError
from convette.pipeline._latency import measurer
from convette.pipeline.conversion import convert_network
from convette.pipeline.inspect import check_network, input_of, is_run, open_model
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import LimitResult, PathPoint
from convette.pipeline.stages.compress import limit_result, path_point, recovery_settings
from convette.pipeline.stages.model import put_card
from convette.pruning import PruneResult, prune
from convette.runtime import Verification, export, exported_size, verify
from convette.training import distributed, evaluate, resolve_device, start_distributed


@dataclass(frozen=True)
class PruneOutcome:
    """A network pruned into `file`: the way there, the limits, accuracy on the test split before and after (None
    without data)."""

    file: Path
    accuracy_before: float | None
    accuracy_after: float | None
    path: tuple[PathPoint, ...]
    limits: tuple[LimitResult, ...]
    text: str
    seconds: float

    @classmethod
    def of(
        cls, result: PruneResult, file: Path, budget: Budget, before: float | None = None, after: float | None = None
    ) -> "PruneOutcome":
        """Return what a pruning to `budget`, written to `file`, came to; `before` and `after` are accuracies."""
        return cls(
            file=file,
            accuracy_before=before,
            accuracy_after=after,
            path=tuple(path_point(record, budget.engines) for record in result.steps),
            limits=tuple(limit_result(status) for status in result.statuses),
            text=status_text(result.statuses),
            seconds=round(result.seconds, 1),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "file": str(self.file),
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "path": [point.model_dump(mode="json") for point in self.path],
            "limits": [limit.model_dump(mode="json") for limit in self.limits],
            "seconds": self.seconds,
        }


def prune_file(recipe: Recipe, out: Path | str) -> PruneOutcome:
    """Prune the network of `recipe` to its budget, recover it on its data, write it to `out` (`.safetensors`).

    The test split is used once, at the end, for both networks. A run that was stopped goes on from ``OUT.checkpoint/``.
    """
    out = Path(out)
    check_prune(recipe, out)
    start_distributed(recipe.run.device)
    if not distributed.is_main():
        set_quiet(True)
    device = resolve_device(recipe.run.device)
    data = load_recipe_data(recipe)
    model = open_recipe_model(recipe, data, "prune")
    example = data.preprocessing(data.train.images([0]))
    check_network(model, recipe.model.name, example)
    convert_network(recipe, model, example)
    data = put_card(model, data, keep_normalisation=recipe.data.mean is not None)
    checkpoints = out.with_name(out.name + ".checkpoint")
    result = prune(
        model,
        data,
        Budget.parse(recipe.budget.limits),
        recipe.prune,
        train_settings=recovery_settings(recipe.train, recipe.prune.epochs),
        measure=measurer(Budget.parse(recipe.budget.limits), recipe.run.contention),
        checkpoint_dir=checkpoints,
        device=device,
    )
    before, after = (
        evaluate(network, data.test, data.preprocessing, device=device).accuracy for network in (model, result.model)
    )
    if distributed.is_main():
        models.save(result.model, out)
        shutil.rmtree(checkpoints, ignore_errors=True)
    distributed.barrier()
    return PruneOutcome.of(result, out, Budget.parse(recipe.budget.limits), before, after)


def check_prune(recipe: Recipe, out: Path) -> None:
    """Raise `UsageError` where `recipe` lacks what pruning into the file `out` needs."""
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: a network is written as .safetensors.")
    if not recipe.budget.limits:
        raise UsageError('prune needs a budget, such as --budget "macs<=50%".')
    if recipe.model.name == "auto":
        raise UsageError("prune needs a network: --model NAME with --weights FILE, or --model FILE.safetensors.")


def load_recipe_data(recipe: Recipe) -> ImageData:
    """Return the data that `recipe` names."""
    return data_room.load_data(**recipe.data.model_dump())


def open_recipe_model(recipe: Recipe, data: ImageData, job: str) -> nn.Module:
    """Return the network that `recipe` names, for its `data`; a note says where the `job` is given one that was never
    trained."""
    section = recipe.model
    model = open_model(
        section.name,
        weights=section.weights,
        pretrained=section.pretrained,
        num_classes=data.num_classes,
        in_channels=data.preprocessing.channels,
        seed=recipe.run.seed,
    )
    saved = Path(section.name).suffix == ".safetensors" or is_run(section.name)
    if not (section.weights or section.pretrained or saved):
        note(f"{job}: {section.name} is untrained; give --weights, --pretrained or a saved file")
    return model


def export_file(
    name: str,
    out: Path | str,
    *,
    to: str | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    data: str | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Export a network (a name or a file) to `out` (`.onnx`, `.xml`); with `data` it is verified on its real images."""
    model = open_model(name, weights=weights, pretrained=pretrained)
    preprocessing = input_of(model, image_size)
    if not surgery.card_of(model).preprocessing:
        card = surgery.card_of(model)
        surgery.set_card(model, type(card)(**{**card.__dict__, "preprocessing": preprocessing.to_json()}))
    example = torch.zeros(1, preprocessing.channels, preprocessing.height, preprocessing.width)
    path = export(model, example, out, to=to)  # type: ignore[arg-type]
    outcome: dict[str, Any] = {"file": str(path), "bytes": exported_size(path), "verified": None}
    if data is None:
        note("export: not verified; with --data SOURCE the file is run on its images and compared with the network")
        return outcome
    images = data_room.load_data(data, channels=preprocessing.channels).test
    check: Verification = verify(path, model, preprocessing(images.images(range(min(512, len(images))))))
    if not check.passed:
        raise ConvetteError(
            f"{path}: gives other answers than the network on {check.engine} (largest difference "
            f"{check.max_abs_error:.3g}, same class on {check.agreement:.2%} of {check.images} images)."
        )
    outcome["verified"] = {"engine": check.engine, "images": check.images, "agreement": check.agreement}
    return outcome
