"""Running a network once while every value carries its labels.

The tracer is a `TorchFunctionMode`: each PyTorch function the network calls passes through it, is carried out as
always, and then its rule says which labels the result has. A function without a rule freezes what it touches.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convette.surgery._calls import family, function_name, inputs_of, numbers_in, source_line, tensors_in
from convette.surgery._labels import LabelStore, Slot, broadcast, inhabited, spread, varying, vector_of
from convette.surgery._records import (
    Call,
    FrozenOperator,
    Layers,
    Operand,
    Records,
    Scope,
    SizeCall,
    Step,
    Value,
)
from convette.surgery._walk import Walk
from convette.surgery._without_values import NeedsValues, WithoutValues

_TAG = "_convette_value"


def _fill(item: "SizeCall", layers: list[Tensor], shape: torch.Size) -> None:
    """Note that the blank tensor made by `item` holds the channels of `layers`."""
    found = []
    for layer in layers:
        while layer.ndim > len(shape):
            layer = layer.select(0, 0)
        for axis, size in enumerate(shape):
            layer = layer.narrow(axis, 0, 1) if size == 1 and layer.shape[axis] > 1 else layer
        if varying(layer):
            found.append(layer)
    item.outputs = ((*item.outputs[0], *found),)


def _common_layer(operands: list[Operand]) -> Tensor | None:
    """Return the first of the layers where each operand has one and all vary along the same axes: the usual sum."""
    if any(len(operand.layers) != 1 or operand.blank is not None for operand in operands):
        return None
    axes = [varying(operand.layers[0]) for operand in operands]
    return operands[0].layers[0] if axes and axes[0] and all(other == axes[0] for other in axes) else None


class Tracer(TorchFunctionMode):
    """The mode under which a network is labelled; see `trace`."""

    def __init__(
        self, walk: Walk, rules: dict[str, Any], reads: frozenset[str], values: WithoutValues | None = None
    ) -> None:
        """Prepare to label the network of `walk` with `rules` (function name -> rule); `reads` are functions without
        effect; `values` carries functions out where they are to be run for their shapes alone."""
        super().__init__()
        self.store = LabelStore()
        self.records = Records()
        self.rules = rules
        self.reads = reads
        self.values = values
        self.module_names = walk.names
        self.parameters = walk.tensors
        self.stack: list[str] = [""]
        self.counts: list[dict[str, int]] = [{}]
        self._names: dict[Any, str] = {}
        self.known: set[int] = set()

    # Values ----------------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of `tensor`; a tensor nobody saw being made is a constant."""
        tag = tensor.__dict__.get(_TAG)
        if tag is not None and tag[0] is self:
            return tag[1]
        if id(tensor) in self.parameters:
            return Value(self.parameter_layers(tensor), True, -1)
        if id(tensor) not in self.known:
            # Made by something that is no PyTorch function (a compiled one, NumPy): a constant as far as one can see,
            # so that edits of this network are always tried by running it.
            self.records.unseen.add(self.stack[-1])
            if self.values is not None and tensor.is_meta:
                raise NeedsValues("a tensor made by something that is no PyTorch function")
        return _CONSTANT

    def mark(self, tensor: Tensor, value: Value) -> None:
        """Attach `value` to `tensor`."""
        if id(tensor) not in self.parameters:
            vars(tensor)[_TAG] = (self, value)

    def layers(self, tensor: Tensor) -> Layers:
        """Return the layers of `tensor`."""
        return self.value(tensor).layers

    def parameter_layers(self, tensor: Tensor) -> Layers:
        """Return one layer for each dimension of a parameter that is longer than 1, labelling it if it is new."""
        return tuple(
            spread(self.own(tensor, dim, "affine"), dim, tensor.shape)
            for dim in range(tensor.ndim)
            if tensor.shape[dim] > 1
        )

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is a parameter or buffer itself, not something computed."""
        return id(tensor) in self.parameters

    def own(self, tensor: Tensor, dim: int, role: str) -> Tensor:
        """Return the labels along `dim` of a parameter, fresh ones if it has none yet."""
        key = (self.parameters[id(tensor)], dim)
        slot = self.store.slots.get(key)
        if slot is None:
            self.store.starts.append(self.store.count)
            slot = Slot(key[0], dim, self.store.fresh(tensor.shape[dim]), role, self.stack[-1])
            self.store.slots[key] = slot
            self.store.owners.append(slot)
        elif role != "affine":
            slot.role = role
        return slot.labels

    def bind(self, tensor: Tensor, dim: int, labels: Tensor, role: str, why: int) -> None:
        """State that `tensor`, a parameter or computed, carries `labels` along `dim`."""
        if self.is_parameter(tensor):
            key = (self.parameters[id(tensor)], dim)
            slot = self.store.slots.get(key)
            if slot is None:
                self.store.slots[key] = Slot(key[0], dim, labels, role, self.stack[-1])
            else:
                self.store.unite(slot.labels, labels, why)
                slot.role = role if role != "affine" else slot.role
            return
        vector = self.axis_vector(tensor, dim, why)
        if vector is None:
            self.store.freeze(labels, why)
        else:
            self.store.unite(vector, labels, why)
            self.note_role(vector, role)

    def note_role(self, labels: Tensor, role: str) -> None:
        """Say what the parameter that owns `labels` does."""
        first = int(labels[0])
        place = bisect.bisect_right(self.store.starts, first) - 1
        if place >= 0 and first < self.store.starts[place] + self.store.owners[place].labels.shape[0]:
            self.store.owners[place].role = role

    def axis_vector(self, tensor: Tensor, axis: int, why: int) -> Tensor | None:
        """Return the labels of `tensor` along `axis` alone; where they also vary elsewhere, that is tied."""
        result: Tensor | None = None
        layers = self.layers(tensor)
        if len(layers) == 1 and varying(layers[0]) == (axis,):
            return vector_of(layers[0])
        for layer in layers:
            axes = varying(layer)
            if axis not in axes:
                continue
            flat = self.store.unite_along(layer, [other for other in axes if other != axis], why)
            index = tuple(slice(None) if other == axis else 0 for other in range(layer.ndim))
            vector = inhabited(flat)[index]
            if result is None:
                result = vector
            else:
                self.store.unite(result, vector, why)
        return result

    # What rules are made of ------------------------------------------------------------------------------------------

    def operand(self, tensor: Tensor, shape: Sequence[int]) -> Operand:
        """Spread the layers of `tensor` over the broadcast `shape`."""
        missing = len(shape) - tensor.ndim
        value = self.value(tensor)
        if value.blank >= 0 and value.blank in self.records.blanks:
            return Operand((False,) * len(shape), (), (self.records.blanks[value.blank], tensor.shape))
        full = tuple(axis >= missing and tensor.shape[axis - missing] > 1 for axis in range(len(shape)))
        return Operand(full, tuple(broadcast(layer, shape) for layer in value.layers))

    def align(self, operands: Iterable[Operand], why: int) -> Layers:
        """State that operands of one shape exist element by element together; return the layers of the result."""
        operands = list(operands)
        common = _common_layer(operands)
        if common is not None:
            for operand in operands[1:]:
                self.store.unite(common, operand.layers[0], why)
            return (common,)
        merged: list[Tensor] = []
        sources: list[set[int]] = []
        axes_of: list[list[set[int]]] = []
        for number, (_, layers, _) in enumerate(operands):
            axes_of.append([set(varying(layer)) for layer in layers])
            for layer, axes in zip(layers, axes_of[-1], strict=True):
                if not axes:
                    continue
                open_ = [j for j in range(len(merged)) if number not in sources[j]]
                near = [j for j in open_ if axes & set(varying(merged[j]))]
                exact = [j for j in near if axes == set(varying(merged[j]))]
                chosen = exact[:1] or near
                if not chosen:
                    merged.append(layer)
                    sources.append({number})
                for j in chosen:
                    self.store.unite(merged[j], layer, why)
                    sources[j].add(number)
                    if len(axes) > len(varying(merged[j])):
                        merged[j] = layer
        for (full, _, blank), own in zip(operands, axes_of, strict=True):
            covered = set().union(*own) if own else set()
            bare = {axis for axis, is_full in enumerate(full) if is_full and axis not in covered}
            if bare:
                for layer in merged:
                    if bare & set(varying(layer)):
                        self.store.freeze(layer, why)
                # What is fixed needs no label to say so.
                merged = [layer for layer in merged if not bare & set(varying(layer))]
            if blank is not None:
                _fill(blank[0], merged, blank[1])
        return tuple(merged)

    def reduced(self, layers: Layers, axes: Sequence[int], call: Call, scoped: bool = True) -> Layers:
        """Return `layers` after a sum over `axes`: length 1 there.

        A layer that also depends on other axes is tied along `axes` (a whole head, one radix); one that depends on
        nothing else is gone, and the call is noted as a statistic over channels if `scoped`.
        """
        result = []
        for layer in layers:
            present = varying(layer)
            gone = [axis for axis in present if axis in axes]
            if gone and len(gone) == len(present):
                if scoped:
                    self.scope(call, tuple(axes), (layer,))
                continue
            if gone:
                layer = self.store.unite_along(layer, gone, call.index)
            for axis in axes:
                if layer.shape[axis] > 1:
                    layer = layer.narrow(axis, 0, 1)
            result.append(layer)
        return tuple(result)

    def scope(self, call: Call, axes: tuple[int, ...], layers: Layers) -> None:
        """Note that `call` computes a statistic over the labelled `axes`."""
        inputs = tuple(self.layers(tensor) for tensor in tensors_in([call.args, call.kwargs], []))
        self.records.scopes.append(Scope(call.index, call.name, call.module, axes, layers, inputs))

    def freeze(self, call: Call, tensors: Iterable[Tensor] | None = None) -> None:
        """Fix every channel of the tensors `call` reads and report it by name."""
        touched = False
        for tensor in tensors_in([call.args, call.kwargs], []) if tensors is None else tensors:
            for layer in self.layers(tensor):
                if varying(layer):
                    touched = True
                    self.store.freeze(layer, call.index)
        if touched:
            self.report(call)

    def report(self, call: Call) -> None:
        """List `call` among the operators that fixed channels."""
        self.records.frozen.append(FrozenOperator(call.name, call.module, source_line()))

    def sized(
        self, call: Call, kind: str, inputs: Layers, outputs: Sequence[Layers], axis: int = 0, given: Any = None
    ) -> None:
        """Note that `call` was given sizes that may have to change."""
        if kind == "shape":
            given = tuple(call.out.shape)
        self.records.sizes.append(
            SizeCall(
                call.index,
                call.name,
                call.module,
                source_line(),
                kind,
                axis,
                given,
                inputs,
                tuple(outputs),
                call.occurrence,
            )
        )

    # The mode itself -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out `func`, then label its result."""
        kwargs = kwargs or {}
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = function_name(func)
        out = func(*args, **kwargs) if self.values is None else self.values(func, name, args, kwargs)
        single = isinstance(out, Tensor)
        if name in self.reads:
            if single:
                self.mark(out, _CONSTANT)
            return out
        results = [out] if single else tensors_in(out, [])
        if results:
            self._record(name, func, args, kwargs, out, results)
        elif name == "__setitem__":
            self._record(name, func, args, kwargs, args[0], [])
        return out

    def _record(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        index = len(self.records.calls)
        kin, counts, module = family(name), self.counts[-1], self.stack[-1]
        counts[kin] = seen = counts.get(kin, -1) + 1
        call = Call(index, name, func, args, kwargs, out, module, seen)
        self.records.calls.append((name, module))
        labelled, weight, blank = self._read(inputs_of(args, kwargs))
        rule = self.rules.get(name)
        if name in _FOLDABLE:
            self._note_step(call)
        elif rule is self.rules["add"]:
            numbers = numbers_in(args)
            # A sum that starts at 0 holds no size.
            if numbers and not (name in _SUMS and numbers == (0,) and isinstance(numbers[0], int)):
                self.records.scalars[index] = SizeCall(index, name, module, "", "scalar", 0, numbers, (), (), seen)
        layers: list[Layers] = []
        if rule is None:
            if labelled:
                self.freeze(call)
        elif rule is self.rules["zeros"]:
            rule(self, call)
            self.mark(results[0], Value((), weight, index, index))
            return
        elif labelled:
            layers = self._ruled(rule, call, results)
        else:
            if name in _GIVEN_SIZES:
                # Fixed channels can still be asked for by a size that was worked out from others.
                self.sized(call, "shape", (), [()])
            if blank >= 0 and rule in (self.rules["add"], self.rules["clone"]):
                self.mark(results[0], Value((), weight, index, blank))
                return
        if layers:
            for tensor, one in zip(results, layers, strict=True):
                self.mark(tensor, Value(one, weight, index))
        else:
            for tensor in results:
                self.mark(tensor, Value((), weight, index))
        for scope in reversed(self.records.scopes):
            if scope.call != index:
                break
            scope.outputs = tuple(self.layers(tensor) for tensor in results)

    def _read(self, inputs: list[Tensor]) -> tuple[bool, bool, int]:
        """Note which calls' results are read; tell whether any input has labels, whether all are weights, and the call
        that made the first of them if all are blank (else -1)."""
        labelled, weight = False, True
        blanks: list[int] = []
        sources: set[int] = set()
        for tensor in inputs:
            tag = tensor.__dict__.get(_TAG)
            if tag is not None and tag[0] is self:
                value = tag[1]
            elif id(tensor) in self.parameters:
                # Labelled by the rule, where it has one; its place in the order is taken here.
                labelled = self.store.reserve(self.parameters[id(tensor)], tensor.shape) or labelled
                blanks.append(-1)
                continue
            else:
                value = self.value(tensor)
            labelled = labelled or bool(value.layers)
            weight = weight and value.weight
            blanks.append(value.blank)
            if value.call >= 0:
                sources.add(value.call)
        uses = self.records.uses
        for source in sources:
            uses[source] = uses.get(source, 0) + 1
        return labelled, weight, blanks[0] if blanks and min(blanks) >= 0 else -1

    def _ruled(self, rule: Any, call: Call, results: list[Tensor]) -> list[Layers]:
        """Apply `rule`; where it does not cover this form of the call, freeze what the call touches."""
        try:
            layers = rule(self, call)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            if self.values is not None:
                # Was it for want of a value? The run with values will tell.
                raise NeedsValues(f"{call.name}: {error}") from error
            layers = None
        if layers is not None and not isinstance(layers, list):
            layers = [layers] * len(results)
        if layers is not None and len(layers) == len(results):
            pairs = zip(results, layers, strict=True)
            if all(layer.shape == tensor.shape and not layer.is_meta for tensor, own in pairs for layer in own):
                return layers
        self.freeze(call)
        return []

    def _note_step(self, call: Call) -> None:
        position, key = (3, "weight") if call.name == "batch_norm" else (1, "weight")
        weight = call.argument(position, key)
        known = weight is None or self.parameters.get(id(weight)) == f"{call.module}.weight".lstrip(".")
        if known and isinstance(call.first, Tensor):
            self.records.steps[call.index] = Step(call.module, self.value(call.first).call)


_SUMS = frozenset(("add", "__add__", "__radd__", "__iadd__"))
_GIVEN_SIZES = frozenset(("view", "reshape", "unflatten", "expand"))
_CONSTANT = Value((), True, -1)


_FOLDABLE = frozenset(
    ["batch_norm", "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
