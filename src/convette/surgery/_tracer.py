"""Running a network once while every value carries its labels.

The tracer is a `TorchFunctionMode`: each PyTorch function the network calls passes through it, is carried out as
always, and then its rule says which labels the result has. A function without a rule freezes what it touches.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convette.surgery._labels import LabelStore, Slot, inhabited, spread, varying

Layers = tuple[Tensor, ...]
_TAG = "_convette_value"
_CHECKER = f"{os.sep}jaxtyping{os.sep}"
_HIDDEN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")


class Value(NamedTuple):
    """What is known of one tensor: its layers, whether it comes from parameters alone, and which call made it.

    `blank` is the call that created it as zeros, ones or the like, -1 for any other: such a tensor belongs to nobody
    until it meets something, and then takes the channels it meets.
    """

    layers: Layers
    weight: bool
    call: int
    blank: int = -1


@dataclass(slots=True)
class Call:
    """One function call of the network."""

    index: int
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    occurrence: int

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument at `position` or called `name`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def first(self) -> Tensor:
        """The tensor the function works on."""
        return self.args[0] if self.args else self.kwargs["input"]

    def on(self, tensor: Tensor) -> Any:
        """Call the same function with the same arguments on `tensor`."""
        if self.args:
            return self.func(tensor, *self.args[1:], **self.kwargs)
        return self.func(**{**self.kwargs, "input": tensor})


class Operand(NamedTuple):
    """A value spread over a common shape: along which axes it has its full size, and its layers in that shape.

    `blank` is set for a tensor of zeros or the like that meets channels here for the first time.
    """

    full: tuple[bool, ...]
    layers: Layers
    blank: "tuple[SizeCall, torch.Size] | None" = None


@dataclass(frozen=True)
class FrozenOperator:
    """A function that fixed the channels it touched: its name, the module that was running and the source line."""

    name: str
    module: str
    where: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.name} in {self.module or 'the model'} ({self.where})"


@dataclass
class SizeCall:
    """A call whose arguments hold sizes that change with the channels, and what it takes to find the new ones."""

    call: int
    name: str
    module: str
    where: str
    kind: str  # shape, slice, split, pad, roll, gather, groups, normalized_shape
    axis: int
    given: Any
    inputs: Layers
    outputs: tuple[Layers, ...]
    occurrence: int


@dataclass
class Scope:
    """A call whose result depends on a statistic over channels: removing one changes the others by nature."""

    call: int
    name: str
    module: str
    axes: tuple[int, ...]
    layers: Layers
    inputs: tuple[Layers, ...]
    outputs: tuple[Layers, ...] = ()


@dataclass
class Fixed:
    """`chosen` was picked by a constant index along `axis` of `layer`, which therefore must not shrink there."""

    layer: Tensor
    axis: int
    chosen: Tensor


@dataclass
class Step:
    """A convolution, linear or batch norm that a module ran on its own weight, and the call whose result it read."""

    module: str
    source: int


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


def source_line() -> str:
    """Return ``file:line`` of the network's code that is running, leaving out PyTorch's own files and ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_HIDDEN, "<")) and _CHECKER not in name:
            return f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def tensors_in(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Collect the tensors in nested lists, tuples and dicts into `found`."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    return found


def inputs_of(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call, in order."""
    found: list[Tensor] = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | dict) and item:
            tensors_in(item, found)
    return found


def numbers_in(args: Iterable[Any]) -> tuple[int | float, ...]:
    """Return the Python numbers among the arguments of a call."""
    return tuple(item for item in args if isinstance(item, int | float) and not isinstance(item, bool))


def function_name(func: Any) -> str:
    """Return a plain name for a function PyTorch hands to a mode: in-place and operator forms fold into one."""
    name = getattr(func, "__name__", "") or ""
    home = getattr(func, "__module__", None) or ""
    if name == "__get__":
        return "." + getattr(func.__self__, "__name__", "?")
    if name == "unfold" and home == "torch.nn.functional":
        return "im2col"
    if home.startswith("torch._ops."):
        return f"{home.removeprefix('torch._ops.')}::{name}"
    if home and not home.startswith("torch"):
        return f"{home}.{name}"
    if name.startswith("__") and name.endswith("__"):
        return name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def family(name: str) -> str:
    """Return the name under which calls are counted: all ways to split count as one, as each can stand for another."""
    return "split" if name in ("chunk", "tensor_split", "split_with_sizes") else name


@dataclass
class Records:
    """What the trace noted besides unions, for solving and for applying edits."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    frozen: list[FrozenOperator] = field(default_factory=list)
    sizes: list[SizeCall] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    boxes: list[tuple[Tensor, int]] = field(default_factory=list)
    fixed: list[Fixed] = field(default_factory=list)
    whole_groups: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # module -> input labels, groups
    heads: dict[str, tuple[int, Tensor]] = field(default_factory=dict)  # nn.MultiheadAttention -> heads
    scalars: dict[int, SizeCall] = field(default_factory=dict)  # calls given Python numbers
    unseen: set[str] = field(default_factory=set)  # modules that read tensors nobody saw being made
    blanks: dict[int, SizeCall] = field(default_factory=dict)  # calls that create zeros, ones...
    uses: dict[int, int] = field(default_factory=dict)  # call -> how often its result was read
    steps: dict[int, Step] = field(default_factory=dict)  # calls that may be folded


class Tracer(TorchFunctionMode):
    """The mode under which a network is labelled; see `trace`."""

    def __init__(self, model: nn.Module, rules: dict[str, Any], reads: frozenset[str]) -> None:
        """Prepare to label `model` with `rules` (function name -> rule); `reads` are functions without effect."""
        super().__init__()
        self.store = LabelStore()
        self.records = Records()
        self.rules = rules
        self.reads = reads
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = [""]
        self.counts: list[dict[str, int]] = [{}]
        self.parameters: dict[int, str] = {}
        # The tensors are held so that their ids stay theirs.
        self.held: list[Tensor] = []
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) not in self.parameters:
                self.parameters[id(tensor)] = name
                self.held.append(tensor)
        self._names: dict[Any, str] = {}
        self.known = {id(tensor) for tensor in _kept_tensors(model)}

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
        return Value((), True, -1)

    def mark(self, tensor: Tensor, value: Value) -> None:
        """Attach `value` to `tensor`."""
        if id(tensor) not in self.parameters:
            setattr(tensor, _TAG, (self, value))

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
            slot = Slot(key[0], dim, self.store.fresh(tensor.shape[dim]), role, self.stack[-1])
            self.store.slots[key] = slot
            self.store.first.append((int(slot.labels[0]), slot))
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
        for start, slot in reversed(self.store.first):
            if start <= first:
                if first < start + len(slot.labels):
                    slot.role = role
                return

    def axis_vector(self, tensor: Tensor, axis: int, why: int) -> Tensor | None:
        """Return the labels of `tensor` along `axis` alone; where they also vary elsewhere, that is tied."""
        result: Tensor | None = None
        for layer in self.layers(tensor):
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
        return Operand(full, tuple(layer.expand(*shape) for layer in value.layers))

    def align(self, operands: Iterable[Operand], why: int) -> Layers:
        """State that operands of one shape exist element by element together; return the layers of the result."""
        operands = list(operands)
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
        out = func(*args, **kwargs)
        if name in self.reads:
            if isinstance(out, Tensor):
                self.mark(out, _CONSTANT)
            return out
        results = [out] if isinstance(out, Tensor) else tensors_in(out, [])
        if not results:
            if name == "__setitem__":
                self._record(name, func, args, kwargs, args[0], [])
            return out
        self._record(name, func, args, kwargs, out, results)
        return out

    def _record(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        index = len(self.records.calls)
        kin = family(name)
        seen = self.counts[-1].get(kin, 0)
        self.counts[-1][kin] = seen + 1
        call = Call(index, name, func, args, kwargs, out, self.stack[-1], seen)
        self.records.calls.append((name, call.module))
        inputs = [self.value(tensor) for tensor in inputs_of(args, kwargs)]
        weight = all(value.weight for value in inputs)
        for source in {value.call for value in inputs if value.call >= 0}:
            self.records.uses[source] = self.records.uses.get(source, 0) + 1
        if name in _FOLDABLE:
            self._note_step(call)
        elif self.rules.get(name) is self.rules["add"]:
            numbers = numbers_in(args)
            if numbers:
                item = SizeCall(index, name, call.module, "", "scalar", 0, numbers, (), (), seen)
                self.records.scalars[index] = item
        rule = self.rules.get(name)
        if rule is None:
            if any(value.layers for value in inputs):
                self.freeze(call)
            layers: list[Layers] = []
        elif rule is self.rules["zeros"]:
            rule(self, call)
            self.mark(results[0], Value((), weight, index, index))
            return
        elif not any(value.layers for value in inputs):
            layers = []
            if name in _GIVEN_SIZES:
                # Fixed channels can still be asked for by a size that was worked out from others.
                self.sized(call, "shape", (), [()])
            blank = [value.blank for value in inputs]
            if blank and min(blank) >= 0 and rule in (self.rules["add"], self.rules["clone"]):
                self.mark(results[0], Value((), weight, index, blank[0]))
                return
        else:
            layers = self._ruled(rule, call, results)
        for tensor, one in zip(results, layers, strict=True) if layers else ():
            self.mark(tensor, Value(one, weight, index))
        if not layers:
            for tensor in results:
                self.mark(tensor, Value((), weight, index))
        for scope in reversed(self.records.scopes):
            if scope.call != index:
                break
            scope.outputs = tuple(self.layers(tensor) for tensor in results)

    def _ruled(self, rule: Any, call: Call, results: list[Tensor]) -> list[Layers]:
        """Apply `rule`; where it does not cover this form of the call, freeze what the call touches."""
        try:
            layers = rule(self, call)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError):
            layers = None
        if layers is not None and not isinstance(layers, list):
            layers = [layers] * len(results)
        if layers is not None and len(layers) == len(results):
            pairs = zip(results, layers, strict=True)
            if all(layer.shape == tensor.shape for tensor, own in pairs for layer in own):
                return layers
        self.freeze(call)
        return []

    def _note_step(self, call: Call) -> None:
        position, key = (3, "weight") if call.name == "batch_norm" else (1, "weight")
        weight = call.argument(position, key)
        known = weight is None or self.parameters.get(id(weight)) == f"{call.module}.weight".lstrip(".")
        if known and isinstance(call.first, Tensor):
            self.records.steps[call.index] = Step(call.module, self.value(call.first).call)


_GIVEN_SIZES = frozenset(("view", "reshape", "unflatten", "expand"))
_CONSTANT = Value((), True, -1)


def _kept_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors modules hold as plain attributes."""
    found: list[Tensor] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name[0] != "_" and isinstance(value, Tensor | list | tuple | dict):
                tensors_in(value, found)
    return found


_FOLDABLE = frozenset(
    ["batch_norm", "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
