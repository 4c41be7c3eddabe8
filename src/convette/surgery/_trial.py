"""Trying edits: by how much the outputs differ with them, the model being as before when that is known."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from convette.errors import StructureError
from convette.layers._watching import call
from convette.surgery._apply import relative_error
from convette.surgery._edits import Change, Edit
from convette.surgery._trace import evaluating, outputs_of

Found = TypeVar("Found")


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return copies of the floating-point outputs of `model` in eval mode."""
    with evaluating(model):
        result = outputs_of(call(model, example), [])
    return [tensor.clone() for tensor in result if tensor.is_floating_point()]


def output_shapes(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all outputs of `model` in eval mode."""
    with evaluating(model):
        return [tuple(tensor.shape) for tensor in outputs_of(call(model, example), [])]


def trial_error(model: nn.Module, edits: Sequence[Edit], example: Any, tolerance: float) -> float:
    """Return the largest relative error of the outputs on `example` once `edits` are made; they are taken back.

    Where it is over `tolerance`, that is repeated on a copy in double precision: networks with odd weights blow
    rounding up, and what is exact in double is exact. Raises `StructureError` where the edited network does not run
    or gives other shapes.
    """
    error = _once(model, edits, example)
    if error <= tolerance:
        return error
    return _once(copy.deepcopy(model).double(), edits, in_double(example))


def with_edits(model: nn.Module, edits: Sequence[Edit], look: Callable[[], Found], failure: str) -> Found:
    """Return what `look` sees of `model` once `edits` are made; they are taken back.

    Raises `StructureError`: that of an edit that does not fit, or `failure` and the reason where anything else fails.
    """
    changes: list[Change] = []
    try:
        for edit in edits:
            changes.append(edit.apply(model))
        return look()
    except StructureError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{failure}: {reason}") from error
    finally:
        for change in reversed(changes):
            change.revert()


def _once(model: nn.Module, edits: Sequence[Edit], example: Any) -> float:
    before = outputs(model, example)
    after = with_edits(model, edits, lambda: outputs(model, example), "the edited network does not run")
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        raise StructureError("the edit changes the shape of the network's output.")
    errors = [relative_error(a, b) for a, b in zip(before, after, strict=True)]
    return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


def in_double(value: Any) -> Any:
    """Return `value` with every floating-point tensor in it in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_double(item) for key, item in value.items()}
    return tuple(map(in_double, value)) if isinstance(value, list | tuple) else value
