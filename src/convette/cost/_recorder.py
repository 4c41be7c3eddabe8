"""Watching one run of a network at the dispatcher: what is multiplied, by whom, and what is alive in memory."""

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convette.cost._formulas import FORMULAS, LINEAR, MATMUL, UNCOUNTED_BY_CONVENTION, Term
from convette.layers._watching import hooked

# These update running statistics without saying so in their schema.
_SILENT_WRITERS = frozenset({"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})


@dataclass(frozen=True)
class Operation:
    """One counted product of the run: `sizes` multiply to `macs`; `weight` names the parameter in it, or is None."""

    module: str
    family: str
    sizes: tuple[int, ...]
    weight: str | None
    bias: int
    norm: int
    shape: tuple[int, ...]

    @property
    def macs(self) -> int:
        return math.prod(self.sizes)


@dataclass
class Visit:
    """What was seen of one module: when it first ran, how often, and the shape of its last output."""

    order: int
    calls: int = 0
    shape: tuple[int, ...] = ()


def storage_key(x: Tensor) -> int | None:
    """Identity of the memory behind `x`, None where there is none to ask (sparse, opaque)."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


class Recorder(TorchDispatchMode):
    """Records the counted products of a run, the module of each, and the peak of the live activation bytes.

    A storage is an activation from the operator that returned it until it is freed; parameters, buffers and constants
    of the network are none, views share their storage, and the inputs are alive for the whole run. What a fused
    operator allocates and frees inside itself is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.visits: dict[str, Visit] = {}
        self.uncounted: set[str] = set()
        self.peak = 0
        self._names = {id(module): name for name, module in model.named_modules(remove_duplicate=True)}
        self._parameters = dict(model.named_parameters(remove_duplicate=True))
        self._modules = dict(model.named_modules(remove_duplicate=True))
        self._owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            if (key := storage_key(parameter)) is not None:
                self._owners[key].append(name)
        self._state = {}
        for tensor in (*model.parameters(), *model.buffers()):
            if (key := storage_key(tensor)) is not None:
                self._state[key] = tensor
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._stack: list[str] = []
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}  # storage -> its death, its bytes (0: a constant)
        self._bytes = 0
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor):
                self._keep(x)

    # --- modules ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Follow which module runs. Hooks are global: hooks on the modules would switch PyTorch's fast paths off."""

        def enter(module: nn.Module, args: Any) -> None:
            name = self._names.get(id(module))
            if name is not None:
                self._stack.append(name)
                visit = self.visits.setdefault(name, Visit(len(self.visits)))
                visit.calls += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            name = self._names.get(id(module))
            if name is not None and self._stack and name in self._stack:
                while self._stack.pop() != name:
                    pass
                self.visits[name].shape = _first_shape(output)

        handles = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave),
        ]
        with hooked(handles):
            yield

    # --- operators -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._schema.name if hasattr(func, "_schema") else f"higher_order::{func.name()}"
        formula = FORMULAS.get(operator)
        if formula is None and hasattr(func, "decompose"):
            # Under inference mode composite operators arrive whole; their parts are what is counted.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._protect(func, args, kwargs)
        self._note_constants((args, kwargs))
        out = func(*args, **kwargs)
        if formula is not None:
            for term in formula(_by_name(func, args, kwargs), out):
                self._record(term)
        elif operator.partition("::")[0] not in ("aten", "prim", "prims") and operator not in UNCOUNTED_BY_CONVENTION:
            self.uncounted.add(operator)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._keep(x)
        return out

    def _record(self, term: Term) -> None:
        weight, module = self._weight_of(term)
        family = LINEAR if term.family == MATMUL and weight is not None else term.family
        self.operations.append(Operation(module, family, term.sizes, weight, term.bias, term.norm, term.shape))
        if module not in self.visits:
            self.visits[module] = Visit(len(self.visits))
        if not self.visits[module].calls:
            self.visits[module].shape = term.shape

    def _weight_of(self, term: Term) -> tuple[str | None, str]:
        """The parameter of a term (None if it has none), and the module the term belongs to."""
        current = self._stack[-1] if self._stack else ""
        for tensor in term.candidates:
            name = self._parameter_name(tensor, current)
            if name is not None:
                return name, name.rpartition(".")[0]
        if term.owner is not None:
            name = self._parameter_name(term.owner, current)
            return None, name.rpartition(".")[0] if name is not None else current
        for tensor in term.candidates:
            # A weight computed from a parameter on the fly (standardised, normalised): same elements, other values.
            alike = [
                (f"{current}.{name}" if current else name)
                for name, p in self._modules[current].named_parameters()
                if p.numel() == tensor.numel() and p.dim() == tensor.dim() and p.dim() > 1
            ]
            if len(alike) == 1 and alike[0] in self._parameters:
                return alike[0], current
        return None, current

    def _parameter_name(self, x: Tensor, current: str) -> str | None:
        key = storage_key(x)
        names = self._owners.get(key, []) if key is not None else []
        if len(names) > 1:  # parameters that are pieces of one block of memory
            names = [n for n in names if self._parameters[n].storage_offset() == x.storage_offset()]
        if not names:
            return None
        for name, parameter in self._modules[current].named_parameters(recurse=False):
            # A parameter shared by several modules belongs to the one that runs.
            if parameter is self._parameters[names[0]]:
                return f"{current}.{name}" if current else name
        return names[0]

    # --- memory ----------------------------------------------------------------------------------------------

    def _keep(self, x: Tensor, activation: bool = True) -> None:
        if storage_key(x) is None:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._state:
            return
        size = storage.nbytes() if activation else 0
        self._live[key] = (weakref.ref(storage, lambda _, key=key: self._free(key)), size)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

    def _free(self, key: int) -> None:
        _, size = self._live.pop(key, (None, 0))
        self._bytes -= size

    def _note_constants(self, arguments: Any) -> None:
        for x in tree_leaves(arguments):
            # A tensor that comes from nowhere in this run is a constant the network holds, no activation.
            if isinstance(x, Tensor):
                self._keep(x, activation=False)

    # --- the network stays as it was -------------------------------------------------------------------------

    def _protect(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy a parameter or buffer before the run writes into it, to put it back afterwards."""
        if not hasattr(func, "_schema"):
            return
        silent = func._schema.name in _SILENT_WRITERS
        if not silent and not func._schema.is_mutable:
            return
        for position, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not written and not (silent and argument.name.startswith("running_")):
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for x in tree_leaves(value):
                key = storage_key(x) if isinstance(x, Tensor) else None
                if key is not None and key in self._state and key not in self._written:
                    state = self._state[key]
                    self._written[key] = (state, state.detach().clone())

    def restore(self) -> None:
        """Put back what the run wrote into parameters and buffers."""
        with torch.no_grad():
            for state, before in self._written.values():
                state.copy_(before)


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    if not hasattr(func, "_schema"):  # flex_attention, the only operator without a schema that has a formula
        return {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    values = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    values.update(kwargs)
    return values


def _first_shape(output: Any) -> tuple[int, ...]:
    for x in tree_leaves(output):
        if isinstance(x, Tensor) and not x.is_nested:
            return tuple(x.shape)
    return ()
