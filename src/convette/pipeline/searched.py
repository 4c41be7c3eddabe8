"""Networks that are not named but searched for: ``[model] name = "dass"``."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from convette._progress import note
from convette.data import ImageData
from convette.errors import UsageError, did_you_mean
from convette.models.cell_network import CellNetwork
from convette.pruning.dass import DASSSettings, search
from convette.pruning.methods import KeepSparsity, ScoreMasks
from convette.training import Method

DASS = "dass"


def check_search(name: str, options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for options that the search called `name` does not have, or of a network that has none."""
    if name != DASS:
        if options:
            raise UsageError(f"model.options = {dict(options)}: only a network that is searched ({DASS}) has options.")
        return
    known = [field.name for field in fields(DASSSettings) if field.name != "seed"]
    for option in options:
        if option not in known:
            raise UsageError(f"model.options: {DASS} has no option {option!r}.{did_you_mean(option, known)}")
    DASSSettings(**options)


def searched_network(name: str, options: Mapping[str, Any], data: ImageData, seed: int) -> nn.Module:
    """Return a fresh network of what the search called `name` finds on the training images, ready to be trained."""
    check_search(name, options)
    settings = DASSSettings(**{**options, "seed": seed})
    found = search(data, settings)
    note(f"dass: normal cell {_words(found.genotype.normal)}; reduction cell {_words(found.genotype.reduction)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CellNetwork(
            settings.channels,
            settings.cells,
            in_channels=data.preprocessing.channels,
            num_classes=data.num_classes,
            genotype=found.genotype,
        )


def methods_of_search(name: str, options: Mapping[str, Any], chosen: Sequence[Method]) -> list[Method]:
    """Return the training methods that the network of a search is meant for, unless one of its kind is `chosen`."""
    if name != DASS or any(isinstance(method, KeepSparsity) for method in chosen):
        return []
    return [ScoreMasks(DASSSettings(**options).sparsity)]


def _words(cell: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{operation} of {source}" for operation, source in cell)
