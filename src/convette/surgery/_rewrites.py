"""Sizes written into a forward: how they are read off a call, replaced in it, and kept replaced for good."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from convette.errors import StructureError
from convette.surgery._calls import family, function_name, numbers_in
from convette.surgery._edits import Change, Rewrite, find_module

Sizes = tuple[tuple[int | float, ...], ...]
_REWRITES = "_convette_rewrites"
_FORWARD = "_convette_forward"


def _shape_arguments(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the sizes a call of `view`, `reshape`, `expand`, `zeros`... is given and how to put others in."""
    creates = name in ("zeros", "ones", "full", "empty")
    start = 0 if creates else 1
    for key in ("size", "shape", "sizes", "repeats", "dims"):
        if key in kwargs:
            return list(kwargs[key]), lambda new, key=key: (args, {**kwargs, key: tuple(new)})
    if name == "unflatten":
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        sizes = args[2] if len(args) > 2 else kwargs["sizes"]
        dim %= args[0].ndim
        # The axes before and after stand for themselves: seen as a whole shape, only the middle is given.
        lead = [None] * dim
        tail = [None] * (args[0].ndim - dim - 1)
        return [*lead, *sizes, *tail], lambda new: (
            (args[0], dim, tuple(new[dim : len(new) - len(tail)])),
            {},
        )
    given = args[start] if len(args) > start else ()
    if isinstance(given, list | tuple | torch.Size):
        return list(given), lambda new: ((*args[:start], tuple(new), *args[start + 1 :]), kwargs)
    if name in ("full", "new_full"):
        return [given], lambda new: ((*args[:start], tuple(new), *args[start + 1 :]), kwargs)
    return list(args[start:]), lambda new: ((*args[:start], *new), kwargs)


def whole_shape(name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> tuple[list[Any], list[Any]]:
    """Return all sizes a shape-giving call has, and all it must have."""
    given, _ = _shape_arguments(name, args, kwargs)
    new = list(given)
    for axis, size in expected:
        new[axis] = size
    return given, new


def _new_shape(given: list[Any], expected: Any, name: str) -> list[Any]:
    result = list(given)
    # Right-aligned for expand, whose new axes may come first; the shapes given are whole in all other cases.
    open_ = -1 in [size for size in given if size is not None]
    for axis, size in expected:
        if result[axis] in (-1, None):
            continue
        may_infer = name in ("view", "reshape", "unflatten") and len(expected) == 1 and not open_
        result[axis] = -1 if may_infer else size
    return result


def given_sizes(
    kind: str, func: Any, name: str, args: Any, kwargs: dict[str, Any], expected: Any
) -> list[tuple[Any, ...]]:
    """Compare what a call is given with what it must be; return (given, needed) for each that differs.

    For shapes the axis comes first.
    """
    if kind == "shape":
        given, _ = _shape_arguments(name, args, kwargs)
        if not all(isinstance(size, int | None) for size in given) or len(given) < len(expected):
            return []
        if name in ("repeat", "tile"):
            sizes = [1] * (len(given) - args[0].ndim) + list(args[0].shape)
            return [(a, given[a], n) for a, n in expected if sizes[a] == 1 and given[a] != n]
        return [(axis, given[axis], size) for axis, size in expected if given[axis] not in (size, None, -1)]
    if kind == "scalar":
        numbers = numbers_in(args)
        return [] if numbers == expected[0] else [(numbers, expected[0])]
    if kind == "normalized_shape":
        sizes = list(args[1] if len(args) > 1 else kwargs["normalized_shape"])
        first = args[0].ndim - len(sizes)
        new = list(sizes)
        for axis, size in expected:
            new[axis - first] = size
        return [(sizes, new)] if new != sizes else []
    if kind == "groups":
        position, key = (1, "num_groups") if name == "group_norm" else (6, "groups")
        groups = args[position] if len(args) > position else kwargs[key]
        return [(groups, expected[0][0])] if groups != expected[0][0] else []
    if kind == "split":
        return _split_difference(name, args, kwargs, expected)
    if kind == "slice":
        return _slice_difference(name, args, kwargs, expected)
    if kind == "pad":
        given = list(args[1] if len(args) > 1 else kwargs["pad"])
        new = _new_pad(given, args[0].ndim, expected)
        return [(a, b) for a, b in zip(given, new, strict=True) if a != b] or ([(given, new)] if given != new else [])
    if kind == "roll":
        shifts, dims = _roll_arguments(args, kwargs)
        wanted = dict(expected)
        wrong = [
            (shift, wanted[dim % args[0].ndim])
            for shift, dim in zip(shifts, dims, strict=True)
            if dim % args[0].ndim in wanted and shift % args[0].shape[dim] != wanted[dim % args[0].ndim]
        ]
        return wrong
    raise StructureError(f"unknown kind of rewrite {kind!r}.")


def _roll_arguments(args: Any, kwargs: dict[str, Any]) -> tuple[list[int], list[int]]:
    shifts = args[1] if len(args) > 1 else kwargs["shifts"]
    dims = args[2] if len(args) > 2 else kwargs["dims"]
    return [shifts] if isinstance(shifts, int) else list(shifts), [dims] if isinstance(dims, int) else list(dims)


def _split_difference(name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> list[tuple[Any, Any]]:
    wanted, axis = list(expected[0]), expected[1][0]
    length = args[0].shape[axis]
    given: Any = args[1] if len(args) > 1 else next(kwargs[key] for key in _SPLIT_KEYS if key in kwargs)
    if name == "chunk":
        step = -(-length // given)
        made = [min(step, length - start) for start in range(0, length, step)]
    elif name == "tensor_split" and isinstance(given, int):
        made = [length // given + (1 if k < length % given else 0) for k in range(given)]
    elif name == "tensor_split":
        edges = [0, *given, length]
        made = [b - a for a, b in itertools.pairwise(edges)]
    elif isinstance(given, int):
        made = [min(given, length - start) for start in range(0, length, given)]
    else:
        made = list(given)
    if made == wanted:
        return []
    if isinstance(given, int) and name == "split":
        full = wanted[:-1] or wanted
        if len(set(full)) == 1 and wanted[-1] <= full[0]:
            return [(given, full[0])]
    return [(list(given) if not isinstance(given, int) else given, wanted)]


_SPLIT_KEYS = (
    "split_size_or_sections",
    "split_size",
    "split_sizes",
    "chunks",
    "sections",
    "indices",
    "tensor_indices_or_sections",
)


def _spans(name: str, args: Any, kwargs: dict[str, Any]) -> dict[int, tuple[int, int]]:
    from convette.surgery._rules_pieces import _axes_used, index_items

    if name == "narrow":
        dim, start, length = (
            args[k] if len(args) > k else kwargs[key] for k, key in ((1, "dim"), (2, "start"), (3, "length"))
        )
        return {dim % args[0].ndim: (int(start), int(start) + int(length))}
    result, axis = {}, 0
    for item in index_items(args[1], args[0].ndim):
        if isinstance(item, slice):
            start, stop, _ = item.indices(args[0].shape[axis])
            result[axis] = (start, stop)
        axis += _axes_used(item)
    return result


def _slice_difference(name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> list[tuple[Any, Any]]:
    given = _spans(name, args, kwargs)
    raw = _raw_spans(name, args, kwargs)
    result = []
    for axis, start, stop in expected:
        if given.get(axis) == (start, stop):
            continue
        for number, wanted in zip(raw.get(axis, given[axis]), (start, stop), strict=True):
            if isinstance(number, int) and number != wanted:
                result.append((number, wanted))
        if not result:
            result.append((given.get(axis), (start, stop)))
    return result


def _raw_spans(name: str, args: Any, kwargs: dict[str, Any]) -> dict[int, tuple[Any, Any]]:
    from convette.surgery._rules_pieces import _axes_used, index_items

    if name == "narrow":
        return dict(_spans(name, args, kwargs))
    result, axis = {}, 0
    for item in index_items(args[1], args[0].ndim):
        if isinstance(item, slice):
            result[axis] = (item.start, item.stop)
        axis += _axes_used(item)
    return result


def _new_pad(given: Sequence[int], ndim: int, expected: Any) -> list[int]:
    new = list(given)
    for axis, before, after in expected:
        k = 2 * (ndim - 1 - axis)
        new[k], new[k + 1] = before, after
    return new


def rewritten(kind: str, func: Any, name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> Any:
    """Carry out a call with the sizes it must be given."""
    if kind == "shape":
        given, put = _shape_arguments(name, args, kwargs)
        args, kwargs = put(_new_shape(given, expected, name))
        return func(*args, **kwargs)
    if kind == "scalar":
        numbers = iter(expected[0])
        return func(*[next(numbers) if numbers_in((item,)) else item for item in args], **kwargs)
    if kind == "normalized_shape":
        sizes = list(args[1] if len(args) > 1 else kwargs.pop("normalized_shape"))
        first = args[0].ndim - len(sizes)
        for axis, size in expected:
            sizes[axis - first] = size
        return func(args[0], tuple(sizes), *args[2:], **kwargs)
    if kind == "groups":
        position, key = (1, "num_groups") if name == "group_norm" else (6, "groups")
        if len(args) > position:
            return func(*args[:position], expected[0][0], *args[position + 1 :], **kwargs)
        return func(*args, **{**kwargs, key: expected[0][0]})
    if kind == "split":
        return torch.split(args[0], list(expected[0]), expected[1][0])
    if kind == "slice":
        return _slice(func, name, args, kwargs, expected)
    if kind == "pad":
        given = args[1] if len(args) > 1 else kwargs["pad"]
        new = _new_pad(list(given), args[0].ndim, expected)
        rest = {key: value for key, value in kwargs.items() if key != "pad"}
        return F.pad(args[0], new, *args[2:], **rest)
    shifts, dims = _roll_arguments(args, kwargs)
    wanted = dict(expected)
    ndim = args[0].ndim
    return torch.roll(args[0], [wanted.get(d % ndim, s) for s, d in zip(shifts, dims, strict=True)], dims)


def _slice(func: Any, name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> Any:
    from convette.surgery._rules_pieces import _axes_used, index_items

    spans = {axis: (start, stop) for axis, start, stop in expected}
    if name == "narrow":
        axis, (start, stop) = next(iter(spans.items()))
        return args[0].narrow(axis, start, stop - start)
    items, axis = [], 0
    for item in index_items(args[1], args[0].ndim):
        items.append(slice(*spans[axis]) if isinstance(item, slice) and axis in spans else item)
        axis += _axes_used(item)
    return func(args[0], tuple(items), *args[2:])


# For good -----------------------------------------------------------------------------------------------------------


class _RewriteMode(TorchFunctionMode):
    """Active while a patched forward runs: replaces the sizes of the calls it was told of."""

    def __init__(self, module: nn.Module, rewrites: Sequence[Rewrite]) -> None:
        super().__init__()
        self.module = module
        self.table = {(item.function, item.occurrence): item for item in rewrites}
        self.functions = {item.function for item in rewrites}
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        kin = family(name)
        if kin not in self.functions or _running_module() is not self.module:
            return func(*args, **kwargs)
        occurrence = self.seen.get(kin, 0)
        self.seen[kin] = occurrence + 1
        item = self.table.get((kin, occurrence))
        if item is None:
            return func(*args, **kwargs)
        return rewritten(item.kind, func, name, args, kwargs, item.sizes)


_CALL_CODE = nn.Module._call_impl.__code__


def _running_module() -> nn.Module | None:
    """Return the innermost module whose call is on the Python stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL_CODE:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


class RewrittenForward:
    """Mixed into the class of a module some of whose sizes are written into its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the sizes it has now."""
        own = self.__dict__.get(_FORWARD)
        with _RewriteMode(self, self.__dict__[_REWRITES]):  # type: ignore[arg-type]
            return own(*args, **kwargs) if own is not None else super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy by naming the original class: the mixed one exists only at run time."""
        return _rebuild, (type(self).__mro__[2], self.__dict__)


def _rebuild(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(state)
    module.__class__ = _mixed(original)
    return module


def _mixed(original: type) -> type:
    return type(f"Rewritten{original.__name__}", (RewrittenForward, original), {"__module__": original.__module__})


def rewrite_calls(model: nn.Module, rewrites: Sequence[Rewrite], change: Change) -> None:
    """Make the modules named in `rewrites` run with other sizes from now on."""
    names = dict.fromkeys(item.module for item in rewrites)
    for name in names:
        module = find_module(model, name)
        new = [item for item in rewrites if item.module == name]
        old_class = type(module)
        old = module.__dict__.get(_REWRITES)
        table = {(item.function, item.occurrence): item for item in [*(old or ()), *new]}
        module.__dict__[_REWRITES] = tuple(table.values())
        if not isinstance(module, RewrittenForward):
            module.__class__ = _mixed(old_class)
        # A forward chosen in the constructor hides the class's: it is kept aside and run inside ours.
        chosen = module.__dict__.pop("forward", None)
        if chosen is not None:
            module.__dict__[_FORWARD] = chosen

        def back(module: nn.Module = module, old_class: type = old_class, old: Any = old, own: Any = chosen) -> None:
            module.__class__ = old_class
            if own is not None:
                module.__dict__.pop(_FORWARD, None)
                module.__dict__["forward"] = own
            if old is None:
                module.__dict__.pop(_REWRITES, None)
            else:
                module.__dict__[_REWRITES] = old

        change.undo.append(back)


def free_heads(model: nn.Module, names: Sequence[str], change: Change) -> None:
    """Let ``nn.MultiheadAttention`` modules hold fewer heads than their width asks for."""
    from convette.surgery._attention import FreeHeadAttention

    for name in names:
        module = find_module(model, name)
        if not isinstance(module, nn.MultiheadAttention):
            raise StructureError(f"module {name!r} is no nn.MultiheadAttention but {type(module).__name__}.")
        old_class = type(module)
        if isinstance(module, FreeHeadAttention):
            continue
        if old_class is not nn.MultiheadAttention:
            raise StructureError(f"module {name!r}: the heads of a {old_class.__name__} cannot be removed.")
        same = module._qkv_same_embed_dim
        module.__class__ = FreeHeadAttention
        # PyTorch's encoder layers ask this before they run the whole layer, attention included, as one operator.
        module._qkv_same_embed_dim = False

        def back(module: nn.MultiheadAttention = module, old_class: type = old_class, same: bool = same) -> None:
            module.__class__ = old_class
            module._qkv_same_embed_dim = same

        change.undo.append(back)
