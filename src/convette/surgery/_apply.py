"""Applying edits to a live network: all or nothing, logged, with optimiser state and averaged copies carried along."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from convette.errors import StructureError
from convette.surgery._edits import Added, Change, Edit, ParameterChange, Shrink
from convette.surgery._fold_layer import without_values
from convette.surgery._log import structure_log
from convette.surgery._slicing import sliced
from convette.surgery._trace import evaluating, outputs_of, run, trace
from convette.surgery._walk import collecting_later


@dataclass
class StructureChange:
    """What `apply` did: each changed parameter or buffer by name, and the edits themselves."""

    parameters: dict[str, ParameterChange] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    added: dict[str, Added] = field(default_factory=dict)

    def migrate_optimizer(self, optimizer: Optimizer) -> None:
        """Point `optimizer` at the new parameters and slice its state (momenta, averages) as they were sliced.

        State tensors of the old parameter's shape are sliced, others (step counts) kept. Parameters that are gone
        leave the optimiser; ones that are new join the group of what they replace or stand beside.
        """
        by_old = {id(change.old): change for change in self.parameters.values()}
        groups = {id(item): group for group in reversed(optimizer.param_groups) for item in group["params"]}
        joining = [(groups.get(id(self._stood_beside(item))), item.parameter) for item in self.added.values()]
        for group in optimizer.param_groups:
            moved = [by_old[id(item)].new if id(item) in by_old else item for item in group["params"]]
            group["params"] = [item for item in moved if item is not None]
        for group, parameter in joining:
            # Beside nothing this optimiser trains: another one's business.
            if group is not None and not any(parameter is item for item in group["params"]):
                group["params"].append(parameter)
        for change in self.parameters.values():
            state = optimizer.state.pop(change.old, None)
            if state is not None and change.new is not None:
                optimizer.state[change.new] = _sliced_state(state, change)

    def _stood_beside(self, item: Added) -> Tensor | None:
        """Return the parameter, of those there were before the edits, that an added one stands beside."""
        added = {id(other.parameter): other for other in self.added.values()}
        old = {id(change.new): change.old for change in self.parameters.values() if change.new is not None}
        near = item.beside
        while near is not None and id(near) in added:
            near = added[id(near)].beside
        return None if near is None else old.get(id(near), near)

    def migrate(self, module_copy: nn.Module) -> "StructureChange":
        """Do the same edits to a copy of the model (an averaged one, a teacher); returns what changed there."""
        return apply(module_copy, *self.edits)


def _sliced_state(state: dict[str, Any], change: ParameterChange) -> dict[str, Any]:
    result = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == change.old.shape and value.ndim:
            result[key] = _carried(value, change.kept)
        else:
            result[key] = value
    return result


def _carried(value: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """Return `value` at the kept indices; where an index is -1 (an entry without ancestor), zeros."""
    result = sliced(value, {dim: index.clamp(min=0) for dim, index in kept.items()})
    for dim, index in kept.items():
        new = (index < 0).nonzero().view(-1)
        if len(new):
            result.index_fill_(dim, new.to(result.device), 0)
    return result


def apply(
    model: nn.Module, *edits: Edit, example: Any = None, prove: bool = False, tolerance: float = 1e-5
) -> StructureChange:
    """Carry out `edits` on `model` in place, in order, and append them to its structure log; all or nothing.

    With `prove` and an `example` the outcome is compared with what it must equal, within the relative `tolerance`: for
    `Shrink` the same network with the removed channels zeroed and left out of every statistic over channels, for edits
    that preserve the function the network as it was. Raises `StructureError`, with the model unchanged, where an edit
    does not fit or a proof fails. Cost: copying the parameters that change; a proof traces the network and runs it
    twice.
    """
    done: list[Change] = []
    result = StructureChange(edits=edits)
    try:
        for edit in edits:
            before = _expected(model, edit, example) if prove else None
            with collecting_later():
                change = edit.apply(model)
            done.append(change)
            if before is not None:
                _compare(before, _outputs(model, example), edit, tolerance)
            if not result.parameters and not result.added:
                result.parameters.update(change.parameters)
            else:
                for name, part in change.parameters.items():
                    _merge(result, name, part)
            result.added.update(change.added)
    except BaseException:
        for change in reversed(done):
            change.revert()
        raise
    structure_log(model).edits.extend(edits)
    return result


def _merge(result: StructureChange, name: str, part: ParameterChange) -> None:
    added = result.added.get(name)
    if added is not None and added.parameter is part.old:
        # Made by an earlier of these edits: nobody outside has seen it yet.
        del result.added[name]
        if isinstance(part.new, nn.Parameter):
            result.added[name] = Added(part.new, added.beside)
        for other in result.added.values():
            if other.beside is part.old:
                other.beside = part.new if part.new is not None else added.beside
        return
    earlier = result.parameters.get(name)
    if earlier is None or earlier.new is not part.old:
        result.parameters[name] = part
        return
    kept = dict(earlier.kept)
    for dim, index in part.kept.items():
        kept[dim] = torch.where(index < 0, index, kept[dim][index.clamp(min=0)]) if dim in kept else index
    result.parameters[name] = ParameterChange(earlier.old, part.new, kept)


def replay(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Carry out `edits` on a freshly built `model`, whose values come later, as loading a file does; returns it."""
    with without_values():
        apply(model, *edits)
    return model


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model):
        return [tensor.clone() for tensor in outputs_of(run(model, example), []) if tensor.is_floating_point()]


def _expected(model: nn.Module, edit: Edit, example: Any) -> list[Tensor]:
    if example is None:
        raise StructureError("a proof needs an example to run the network on.")
    if isinstance(edit, Shrink):
        from convette.surgery._proof import expected_outputs

        return expected_outputs(trace(model, example), edit)
    return _outputs(model, example)


def _compare(before: list[Tensor], after: list[Tensor], edit: Edit, tolerance: float) -> None:
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        raise StructureError(f"the {edit.kind} edit changes the shape of the network's output.")
    if not getattr(edit, "preserves", True):
        return  # An edit meant to change what the network computes proves its shapes.
    for a, b in zip(before, after, strict=True):
        error = relative_error(a, b)
        if not error <= tolerance:
            raise StructureError(f"the {edit.kind} edit is not exact: relative error {error:.1e} over {tolerance:.0e}.")


def relative_error(expected: Tensor, given: Tensor) -> float:
    """Return max |expected - given| / max |expected| (0 for empty tensors)."""
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    error = float((expected - given).abs().max())
    return error / scale if scale > 0 else error
