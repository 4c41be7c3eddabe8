"""What a stage gets to work with: recipe, data, networks of earlier stages, where to write."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette import data as data_room
from convette import models, surgery
from convette.cost import DEFAULT_ENGINE, Budget
from convette.data import ImageData
from convette.errors import DataError
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import DataResult, StageResult
from convette.pipeline.run_folder import RunFolder
from convette.runtime import EngineSpec
from convette.training import distributed, resolve_device

MODEL_FILE = "model.safetensors"


class Run:
    """A run in one process: everything a stage reads comes from here, loaded when first asked for."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe = recipe
        self.folder = folder

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def device(self) -> torch.device:
        """Where networks are trained and evaluated."""
        return resolve_device(self.recipe.run.device)

    @cached_property
    def budget(self) -> Budget | None:
        """The budget, every latency limit with its engine; None without one."""
        limits = self.recipe.budget.limits
        return Budget.parse(limits).on(DEFAULT_ENGINE) if limits else None

    @cached_property
    def named_engine(self) -> EngineSpec | None:
        """The engine the budget names (the first of several): its file is the one to deploy. None if it names none."""
        limits = Budget.parse(self.recipe.budget.limits).limits if self.recipe.budget.limits else ()
        return next((EngineSpec.parse(limit.engine) for limit in limits if limit.engine), None)

    @cached_property
    def raw_data(self) -> ImageData:
        """The data as the recipe says. Raises `DataError` when it is not what the run was begun with."""
        from convette.pipeline.results import read_result

        section = self.recipe.data
        data = data_room.load_data(**section.model_dump())
        begun: DataResult | None = read_result(self.path, "data")
        if begun is not None and begun.fingerprint != data.fingerprint:
            raise DataError(
                f"{section.source}: is not the data this run was begun with ({self.path}). "
                "Put the old data back, or give another --out, or --restart to begin anew."
            )
        return data

    @cached_property
    def data(self) -> ImageData:
        """The data, normalised as the network expects it (known from the stage `model` on)."""
        preprocessing = surgery.card_of(self.network("model")).preprocessing
        mean, std = preprocessing["mean"], preprocessing["std"]
        return self.raw_data.with_preprocessing(mean=mean, std=std)

    @cached_property
    def example(self) -> Tensor:
        """One real image, ready for the network: what costs are counted and measured on."""
        return self.data.preprocessing(self.data.train.images([0]))

    def network(self, stage: str) -> nn.Module:
        """Return the network that `stage` left, from its file: undisturbed and resumed runs go on from the same."""
        # The user typed these names into the command or the recipe of this run, so their code may be imported.
        name = self.recipe.model.name
        with surgery.trusting(*(step.by for step in self.recipe.convert.steps if ":" in step.by)):
            return models.load(self.path / stage / MODEL_FILE, constructor=name if is_callable_name(name) else None)

    @cached_property
    def few_bits(self) -> bool:
        """Whether the stage quantize writes the network itself in few bits: as asked, or because a size is limited."""
        quantize = self.recipe.quantize
        if quantize.mode == "off" or "quantize" not in self.folder.stages:
            return False
        metrics = {limit.metric for limit in self.budget.limits} if self.budget else set()
        # Where a latency is limited, engines decide what is fast enough.
        by_itself = quantize.method == "auto" and "size" in metrics and "latency" not in metrics
        return quantize.method == "low_bit" or by_itself

    @cached_property
    def bits_tried(self) -> tuple[int, ...]:
        """The bits a weight for which the network is pruned; none where its size is not met by bits."""
        limited = self.budget is not None and any(limit.metric == "size" for limit in self.budget.limits)
        if not (self.few_bits and limited):
            return ()
        quantize = self.recipe.quantize
        return (quantize.bits,) if quantize.bits else quantize.tried

    def final_stage(self) -> str:
        """Return the last stage that changed the network."""
        if self.folder.finished("quantize") and (self.path / "quantize" / MODEL_FILE).exists():
            return "quantize"
        return "compress" if self.folder.finished("compress") else "train"

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a network; of several ranks only the first does."""
        if distributed.is_main():
            models.save(model, path)


@dataclass(frozen=True)
class Stage:
    """A step of a run: `run` writes files into the folder it is given and returns the result.

    `left_out` says why a recipe has no need of the stage (None: it has). A stage `on_all_ranks` runs in every process
    of a torchrun run, any other in the first alone.
    """

    name: str
    run: Callable[[Run, Path], StageResult]
    left_out: Callable[[Recipe], str | None] = lambda recipe: None
    on_all_ranks: bool = False


def is_callable_name(name: str) -> bool:
    """Whether a model's name is ``package.module:callable``: code of the user's own."""
    source, _, symbol = name.partition(":")
    return bool(symbol) and source not in ("timm", "torchvision", "convette")


def seed_everything(seed: int, stage: str) -> None:
    """Set all random generators from `seed` and the stage's name, so that skipping earlier stages changes nothing."""
    value = zlib.crc32(f"{seed}/{stage}".encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
