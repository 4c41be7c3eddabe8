"""Changing the network's structure while an optimiser lives on it."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from convette.errors import StructureError
from convette.training.distributed import broadcast
from convette.training.events import Event

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


def edit_structure(trainer: "Trainer", edits: Sequence[Any], *, in_step: bool = False) -> Any:
    """Carry out `Trainer.edit_structure`."""
    from convette import surgery

    if in_step:
        raise StructureError(
            "the structure cannot be edited inside a step; do it at BATCH_START, BATCH_END or between epochs."
        )
    state = trainer.state
    # The edits travel as JSON, so that every rank applies exactly what rank 0 decided.
    edits = [surgery.edit_from_json(edit) for edit in broadcast([edit.to_json() for edit in edits])]
    tapped = state.taps.detach()
    state.images = state.targets = state.outputs = state.loss = None
    for optimizer in state.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    try:
        change = surgery.apply(state.model, *edits)
    finally:
        state.taps.request(*(name for name in tapped if _has(state.model, name)))
    for optimizer in state.optimizers.values():
        change.migrate_optimizer(optimizer)
    if state.ema is not None:
        change.migrate(state.ema.module)
        state.ema.rebuild(state.model)
    # The old DDP wrapper hangs hooks on surviving parameters until it is gone.
    state.wrapper = None
    gc.collect()
    trainer.wrap()
    state.wrapper.train()
    state.steppers = {name: trainer.fabric.wrap_optimizer(opt) for name, opt in state.optimizers.items()}
    state.change = change
    if trainer.log is not None:
        trainer.log.event("structure_changed", state.clock.step, edits=[edit.to_json() for edit in edits])
    trainer.emit(Event.STRUCTURE_CHANGED)
    return change


def _has(model: Any, name: str) -> bool:
    return any(found == name for found, _ in model.named_modules())
