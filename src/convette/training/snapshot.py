"""Everything a run is, as one tree of tensors and plain values, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from convette.errors import FileFormatError
from convette.training.checkpoints import random_state, set_random_state
from convette.training.distributed import gather
from convette.training.optimizers import load_optimizer_state, optimizer_state
from convette.training.state import Clock, EpochRecord

if TYPE_CHECKING:
    from torch import nn

    from convette.training.trainer import Trainer

FORMAT = 1


def take(trainer: "Trainer") -> dict[str, Any]:
    """Return the tree of `trainer` as it is between two steps. All ranks must call it together."""
    from convette import surgery

    state = trainer.state
    names = {id(parameter): name for name, parameter in _parameters(trainer).items()}
    return {
        "format": FORMAT,
        "header": trainer.header,
        "finished": trainer.finished,
        "clock": asdict(state.clock),
        "structure": [edit.to_json() for edit in surgery.structure_log(state.model).edits],
        "model": dict(state.model.state_dict()),
        "ema": state.ema.state_dict() if state.ema is not None else None,
        "optimizers": {name: optimizer_state(opt, names) for name, opt in state.optimizers.items()},
        "auxiliary": dict(state.auxiliary.state_dict()),
        "methods": {method.name: method.state_dict() for method in trainer.methods},
        "stores": dict(state.stores),
        "random": gather(random_state(state.device)),
        "history": [record.to_json() for record in state.history],
        "sums": dict(trainer.sums),
        "counts": dict(trainer.counts),
    }


def restore_network(trainer: "Trainer", tree: Mapping[str, Any]) -> None:
    """Give the network the structure and the tensors of `tree`: edits it lacks are replayed, tensors load strictly."""
    from convette import surgery

    model = trainer.state.model
    ours = json.loads(json.dumps([edit.to_json() for edit in surgery.structure_log(model).edits]))
    theirs = list(tree["structure"])
    if theirs[: len(ours)] != ours:
        raise FileFormatError(
            "the checkpoint belongs to a network with another history of edits; use another checkpoint folder."
        )
    if len(theirs) > len(ours):
        surgery.replay(model, [surgery.edit_from_json(edit) for edit in theirs[len(ours) :]])
    try:
        model.load_state_dict(tree["model"], strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise FileFormatError(
            f"the checkpoint does not fit the network ({reason}); use another checkpoint folder."
        ) from error


def restore_rest(trainer: "Trainer", tree: Mapping[str, Any]) -> None:
    """Put back everything else of `tree`, the random number generators last."""
    state = trainer.state
    state.clock = Clock(**tree["clock"])
    trainer.finished = bool(tree["finished"])
    state.history[:] = [EpochRecord(**record) for record in tree["history"]]
    if state.ema is not None:
        state.ema.load_state_dict(tree["ema"])
    state.auxiliary.load_state_dict(tree["auxiliary"], strict=True)
    if not trainer.finished:
        trainer.start_optimizer()
        parameters = _parameters(trainer)
        for name, optimizer in state.optimizers.items():
            load_optimizer_state(optimizer, tree["optimizers"][name], parameters)
    for method in trainer.methods:
        if method.name not in tree["methods"]:
            raise FileFormatError(f"the checkpoint was written without the method {method.name!r}; leave it out.")
        method.load_state_dict(tree["methods"][method.name])
    state.stores = dict(tree["stores"])
    trainer.sums = {name: value.to(state.device) for name, value in tree["sums"].items()}
    trainer.counts = dict(tree["counts"])
    if trainer.fabric.rank < len(tree["random"]):
        set_random_state(tree["random"][trainer.fabric.rank], state.device)


def _parameters(trainer: "Trainer") -> "dict[str, nn.Parameter]":
    state = trainer.state
    return {
        **{f"model.{name}": p for name, p in state.model.named_parameters()},
        **{f"auxiliary.{name}": p for name, p in state.auxiliary.named_parameters()},
    }
