"""`trace`: run a network once on an example and work out which channels go together."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import StructureError
from convette.layers._watching import call
from convette.surgery import _rules
from convette.surgery._graph import ChannelGraph
from convette.surgery._labels import narrowed, normalised, varying
from convette.surgery._records import Records
from convette.surgery._sizes import Probe
from convette.surgery._tracer import Tracer
from convette.surgery._walk import Kept, Walk, collecting_later
from convette.surgery._without_values import WithoutValues, without_values

_ROUNDS = 30


@contextlib.contextmanager
def evaluating(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Put `model` into eval mode without gradients for a while; every module's own mode comes back afterwards."""
    training = [module for module in (model.modules() if modules is None else modules) if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    if training:
        model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


@contextlib.contextmanager
def running_modules(tracer: "Tracer | Probe") -> Iterator[None]:
    """Keep on ``tracer.stack`` the module that is running, and in ``tracer.counts`` what it has called so far."""
    names, stack, counts = tracer.module_names, tracer.stack, tracer.counts

    called = nn.Module.__call__

    def entering(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack.append(names.get(id(module), stack[-1]))
        counts.append({})
        try:
            return called(module, *args, **kwargs)
        finally:
            stack.pop()
            counts.pop()

    # PyTorch's hooks for all modules would do, but take the slow way through every call.
    nn.Module.__call__ = entering
    try:
        yield
    finally:
        nn.Module.__call__ = called


def outputs_of(value: Any, found: list[Tensor], depth: int = 0) -> list[Tensor]:
    """Collect the tensors of any output: nested containers, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            outputs_of(item, found, depth + 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            outputs_of(item, found, depth + 1)
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            outputs_of(getattr(value, item.name), found, depth + 1)
    elif hasattr(value, "__dict__") and depth < 3 and not isinstance(value, nn.Module | type):
        for item in vars(value).values():
            outputs_of(item, found, depth + 1)
    return found


def trace(model: nn.Module, example: Any, *, values: bool = False) -> ChannelGraph:
    """Label every channel of `model` and return the groups of those that can be removed.

    The network runs once, in eval mode and without gradients, on `example`: a tensor, a tuple of arguments or a dict
    of named arguments, on the model's device. Sizes should be distinct. Only shapes are worked out; where the network
    asks for a value (a detector that ranks its boxes), or with `values`, it runs as it is. The model is left untouched.
    What the outputs hold is fixed, and so is everything a function without a label rule touches; such functions are
    listed in ``graph.frozen``.

    Cost: some 50 microseconds a function called, or about two forward passes where values are needed. Raises
    `StructureError` where the network does not run on the example.
    """
    with collecting_later():
        return _traced(model, example, values)


def _traced(model: nn.Module, example: Any, values: bool) -> ChannelGraph:
    walk = Walk(model)
    kept = Kept(walk)
    try:
        with evaluating(model, walk.modules):
            tracer, reason = (None, "asked for") if values else _without(model, example, walk, kept)
            if tracer is None:
                tracer = Tracer(walk, _rules.table(), _rules.READS)
                tracer.records.needed = reason
                _label(tracer, model, example, kept)
            tracer.store.sort()
            roots = settle(tracer)
    finally:
        kept.restore()
    return ChannelGraph(model, example, tracer.store, tracer.records, roots)


def _without(model: nn.Module, example: Any, walk: Walk, kept: Kept) -> tuple[Tracer | None, str]:
    """Label the network by its shapes alone; where that takes values, return None and what asked for them."""
    try:
        bare, device = without_values(example)
    except (RuntimeError, NotImplementedError):
        device = None
    if device is None:
        return None, "the example"
    values = WithoutValues(device, _rules.table(), _rules.READS)
    drawn = torch.get_rng_state()
    tracer = Tracer(walk, _rules.table(), _rules.READS, values)
    try:
        _label(tracer, model, bare, kept)
    except Exception as error:  # whatever it was, the run with values will tell
        values.reason = values.reason or str(error)
    if values.reason is None:
        return tracer, ""
    torch.set_rng_state(drawn)
    kept.restore()
    return None, values.reason


def _label(tracer: Tracer, model: nn.Module, example: Any, kept: Kept) -> None:
    kept.forget()
    tracer.known.update(id(tensor) for tensor in (*kept.tensors, *outputs_of(example, [])))
    with running_modules(tracer), tracer:
        output = run(model, example)
    last = len(tracer.records.calls)
    tracer.records.calls.append(("output", ""))
    for tensor in outputs_of(output, []):
        value = tracer.value(tensor)
        tracer.records.uses[value.call] = tracer.records.uses.get(value.call, 0) + 1
        for layer in value.layers:
            tracer.store.freeze(layer, last)


def run(model: nn.Module, example: Any) -> Any:
    """Call `model` on an example; raises `StructureError` where it does not run."""
    try:
        return call(model, example)
    except StructureError:
        raise
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise StructureError(f"{type(model).__name__} does not run on the example: {first}") from error


def settle(tracer: Tracer) -> np.ndarray:
    """Solve the unions; tie and fix what its use demands until nothing changes; return each label's root."""
    records = tracer.records
    for _ in range(_ROUNDS):
        roots = tracer.store.solve()
        table = torch.from_numpy(roots)
        if not (_tie_boxes(tracer, records, table) or _fix_chosen(tracer, records, table)):
            return roots
    raise StructureError("the labels of this network do not settle; please report the model.")


def _tie_boxes(tracer: Tracer, records: Records, roots: Tensor) -> bool:
    """Make each layer depend on one axis in the end, the one that leaves most choice; tell whether that tied any."""
    tied = False
    left = []
    for layer, why in records.boxes:
        now = normalised(roots[narrowed(layer)])
        axes = varying(now)
        if len(axes) > 1:
            best = max(axes, key=lambda axis: now.shape[axis])
            tracer.store.unite_along(now, [axis for axis in axes if axis != best], why)
            tied = True
            left.append((layer, why))
        elif axes:
            left.append((layer, why))
    records.boxes = left
    return tied


def _fix_chosen(tracer: Tracer, records: Records, roots: Tensor) -> bool:
    fixed = False
    left = []
    for item in records.fixed:
        if item.axis in varying(normalised(roots[narrowed(item.layer)])):
            chosen = roots[narrowed(item.chosen)]
            if bool((chosen != 0).any()):
                tracer.store.freeze(normalised(chosen), len(records.calls) - 1)
                fixed = True
        left.append(item)
    records.fixed = left
    return fixed
