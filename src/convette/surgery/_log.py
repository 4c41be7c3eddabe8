"""Where a network came from and what was done to it: origin, structure log, model card.

All three hang on the model as plain attributes, so that they survive ``copy.deepcopy`` and never appear in its
``state_dict``.
"""

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from convette.errors import FileFormatError
from convette.surgery._edits import Edit

_LOG = "_convette_structure_log"
_CARD = "_convette_model_card"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Origin:
    """A constructor and its arguments: what builds the network before its first edit.

    ``Origin("timm:resnet18", {"num_classes": 10, "in_channels": 1})``. `arguments` holds JSON values only.
    """

    constructor: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the origin as a JSON object."""
        return {"constructor": self.constructor, "arguments": self.arguments}

    @staticmethod
    def from_json(value: Any) -> "Origin":
        """Read an origin; raises `FileFormatError` where it is missing or not of this form."""
        if not isinstance(value, dict):
            raise FileFormatError("the file does not say which constructor built the network ('origin' is missing).")
        constructor, arguments = value.get("constructor"), value.get("arguments", {})
        if not isinstance(constructor, str) or not 0 < len(constructor) <= 500:
            raise FileFormatError("origin.constructor must be the name of a constructor, such as 'timm:resnet18'.")
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            raise FileFormatError("origin.arguments must be an object of named arguments.")
        return Origin(constructor, arguments)


@dataclass
class StructureLog:
    """The origin of a network (None: unknown) and the edits made since, in order."""

    origin: Origin | None = None
    edits: list[Edit] = field(default_factory=list)


@dataclass(frozen=True)
class ModelCard:
    """What one must know to use the network: task, class names, preprocessing (JSON form) and its history.

    `history` holds one JSON object a step: ``{"step": "train", ...figures}``.
    """

    task: str = "classification"
    class_names: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        return {
            "task": self.task,
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing,
            "history": list(self.history),
        }

    @staticmethod
    def from_json(value: Any) -> "ModelCard":
        """Read a card; raises `FileFormatError` where it is not of this form."""
        if not isinstance(value, dict):
            raise FileFormatError("the model card must be an object.")
        task, names = value.get("task", "classification"), value.get("class_names", [])
        preprocessing, history = value.get("preprocessing", {}), value.get("history", [])
        if not isinstance(task, str):
            raise FileFormatError("card.task must be a text.")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FileFormatError("card.class_names must be a list of texts.")
        if not isinstance(preprocessing, dict):
            raise FileFormatError("card.preprocessing must be an object.")
        if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
            raise FileFormatError("card.history must be a list of objects.")
        return ModelCard(task, tuple(names), preprocessing, tuple(history))


def structure_log(model: nn.Module) -> StructureLog:
    """Return the structure log of `model`; one without origin is attached if it has none yet."""
    log = model.__dict__.get(_LOG)
    if log is None:
        log = StructureLog()
        model.__dict__[_LOG] = log
    return log


def set_origin(model: Model, origin: Origin) -> Model:
    """State which constructor call built `model`, just built; its log starts anew. Returns the model.

    Raises `TypeError` where an argument is not a JSON value.
    """
    json.dumps(origin.to_json(), allow_nan=False)
    model.__dict__[_LOG] = StructureLog(origin)
    return model


def card_of(model: nn.Module) -> ModelCard:
    """Return the card of `model`, an empty one if it has none."""
    return model.__dict__.get(_CARD) or ModelCard()


def set_card(model: Model, card: ModelCard) -> Model:
    """Attach `card` to `model`; returns the model."""
    model.__dict__[_CARD] = card
    return model
