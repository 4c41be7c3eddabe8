"""Sizes written in Python: what each noted call must be given after an edit, and which attribute holds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from convette.errors import StructureError
from convette.surgery._calls import family, function_name, source_line, tensors_in
from convette.surgery._labels import narrowed, normalised, varying
from convette.surgery._records import Layers, SizeCall
from convette.surgery._rewrites import given_sizes, rewritten, whole_shape
from convette.surgery._without_values import WithoutValues

Sizes = tuple[tuple[int | float, ...], ...]


class Vectors:
    """Which roots stand along an axis of some layers: worked out once, whatever stays."""

    def __init__(self, roots: Tensor) -> None:
        """`roots`: root of each label."""
        self.roots = roots
        # The layers are held, so that their ids stay theirs.
        self._known: dict[tuple[int, int], tuple[Layers, tuple[int, ...]]] = {}
        self._numbers: dict[bytes, int] = {}
        self.found: list[Tensor] = []

    def along(self, layers: Layers, axis: int) -> tuple[int, ...]:
        """Return the numbers of the vectors (in `found`) of the layers that vary along `axis` alone."""
        known = self._known.get((id(layers), axis))
        if known is None:
            numbers: dict[int, None] = {}
            for layer in layers:
                if axis not in varying(layer):
                    continue
                roots = normalised(self.roots[narrowed(layer)])
                if varying(roots) == (axis,):
                    vector = roots[tuple(slice(None) if a == axis else 0 for a in range(roots.ndim))].contiguous()
                    number = self._numbers.setdefault(vector.numpy().tobytes(), len(self.found))
                    if number == len(self.found):
                        self.found.append(vector)
                    numbers[number] = None
            known = self._known[id(layers), axis] = (layers, tuple(numbers))
        return known[1]


class Expectation:
    """What the noted calls must be given when only the labels in `keep` remain."""

    def __init__(self, roots: Tensor, keep: Tensor, vectors: Vectors | None = None) -> None:
        """`roots`: root of each label; `keep`: whether each root stays; `vectors`: over these roots."""
        self.roots = roots
        self.keep = keep
        self.dropped = ~keep
        self.vectors = vectors or Vectors(roots)
        self._along: dict[tuple[int, ...], Tensor | None] = {}

    def along(self, layers: Layers, axis: int) -> Tensor | None:
        """Return which indices of `axis` stay, None if all do."""
        numbers = self.vectors.along(layers, axis)
        if numbers not in self._along:
            result: Tensor | None = None
            for number in numbers:
                stay = self.keep[self.vectors.found[number]]
                result = stay if result is None else result & stay
            self._along[numbers] = None if result is None or bool(result.all()) else result
        return self._along[numbers]

    def sizes(self, item: SizeCall) -> Sizes | None:
        """Return the sizes `item` must be given, in the form of `given_sizes`; None where nothing changes."""
        return getattr(self, f"_{item.kind}")(item)

    def _shape(self, item: SizeCall) -> Sizes | None:
        # Every axis counts: a size that must stay can be worked out from one that changes.
        shape = list(item.given)
        layers = item.outputs[0]
        for axis in {axis for layer in layers for axis in varying(layer)}:
            stay = self.along(layers, axis)
            if stay is not None:
                shape[axis] = int(stay.sum())
        return tuple(enumerate(shape))

    def _normalized_shape(self, item: SizeCall) -> Sizes | None:
        result = []
        for axis in range(item.axis, item.axis + len(item.given)):
            stay = self.along(item.outputs[0], axis)
            if stay is not None:
                result.append((axis, int(stay.sum())))
        return tuple(result) or None

    def _scalar(self, item: SizeCall) -> Any:
        # A number that was worked out from a width (one over the root of a head's size) stays what it was: then the
        # shrunk network computes what the masked one does.
        return (tuple(item.given),)

    def _slice(self, item: SizeCall) -> Sizes | None:
        result, changed = [], False
        for axis, start, stop in item.given:
            stay = self.along(item.inputs, axis)
            if stay is None:
                result.append((axis, start, stop))
                continue
            changed = True
            result.append((axis, int(stay[:start].sum()), int(stay[:stop].sum())))
        return tuple(result) if changed else None

    def _split(self, item: SizeCall) -> Sizes | None:
        stay = self.along(item.inputs, item.axis)
        if stay is None:
            return None
        return (tuple(int(part.sum()) for part in stay.split(list(item.given))), (item.axis,))

    def _pad(self, item: SizeCall) -> Sizes | None:
        result, changed = [], False
        for axis, before, after in item.given:
            wide, narrow = self.along(item.outputs[0], axis), self.along(item.inputs, axis)
            changed = changed or wide is not None or narrow is not None
            sides = []
            for amount, end in ((before, False), (after, True)):
                source = wide if amount > 0 else narrow
                if source is None:
                    sides.append(amount)
                    continue
                part = source[len(source) - abs(amount) :] if end else source[: abs(amount)]
                sides.append(int(part.sum()) * (1 if amount > 0 else -1))
            result.append((axis, *sides))
        return tuple(result) if changed else None

    def _roll(self, item: SizeCall) -> Sizes | None:
        result, changed = [], False
        for axis, shift in item.given:
            stay = self.along(item.inputs, axis)
            if stay is None:
                result.append((axis, shift))
                continue
            changed = True
            shift %= len(stay)
            result.append((axis, int(stay[len(stay) - shift :].sum()) if shift else 0))
        return tuple(result) if changed else None

    def _groups(self, item: SizeCall) -> Sizes | None:
        _, heads = item.given
        stay = self.keep[self.roots[heads]]
        return None if bool(stay.all()) else ((int(stay.sum()),),)


class Mismatch:
    """A call that was given other sizes than it must be."""

    def __init__(self, item: SizeCall, expected: Sizes, literals: list[Any], whole: Any = None) -> None:
        """`literals`: pairs of what stood in the call and what must stand there; `whole`: the same of all of it."""
        self.item, self.expected, self.literals, self.whole = item, expected, literals, whole


def changes(item: SizeCall, sizes: Any) -> bool:
    """Tell whether a noted call is given other sizes than before."""
    if item.kind == "shape":
        return tuple(size for _, size in sizes) != tuple(item.given)
    return item.kind != "scalar"


class _Bound:
    """A function that is carried out by a run without values."""

    __slots__ = ("func", "name", "values")

    def __init__(self, values: WithoutValues, func: Any, name: str) -> None:
        self.values, self.func, self.name = values, func, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.values(self.func, self.name, args, kwargs)


class Probe(TorchFunctionMode):
    """Runs a shrunk network beside the record of the whole one and puts right, and notes, every wrong size."""

    def __init__(
        self,
        module_names: dict[int, str],
        calls: Sequence[tuple[str, str]],
        items: Mapping[int, tuple[SizeCall, Sizes]],
        reads: frozenset[str],
        opaque: frozenset[str],
        values: WithoutValues | None = None,
    ) -> None:
        """`items`: the noted calls that change, by index, with the sizes they must be given; `values` carries
        functions out where they are run for their shapes alone."""
        super().__init__()
        self.values = values
        self.module_names = module_names
        # Modules that run otherwise than they did: nothing inside them is compared.
        self.opaque = opaque
        self.stack: list[str] = [""]
        self.counts: list[dict[str, int]] = [{}]
        self.calls, self.items, self.reads = calls, items, reads
        self.mismatches: list[Mismatch] = []
        self.index = 0
        self.lost = False
        self.failed_in: tuple[str, str] | None = None
        self._names: dict[Any, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out `func`, with its sizes put right where the record asks for it."""
        kwargs = kwargs or {}
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = function_name(func)
        if self.values is not None:
            func = _Bound(self.values, func, name)
        if name in self.reads:
            return func(*args, **kwargs)
        if self.lost or self.stack[-1] in self.opaque:
            return func(*args, **kwargs)
        while self.index < len(self.calls) and self.calls[self.index][1] in self.opaque:
            self.index += 1
        pair = self.items.get(self.index)
        try:
            out = func(*args, **kwargs) if pair is None else self._checked(pair, name, func, args, kwargs)
        except StructureError:
            raise
        except Exception:
            self.failed_in = self.failed_in or (self.stack[-1], source_line())
            raise
        if isinstance(out, Tensor) or name == "__setitem__" or tensors_in(out, []):
            if self.index >= len(self.calls) or family(self.calls[self.index][0]) != family(name):
                self._lose(name)
            self.index += 1
        return out

    def _lose(self, name: str) -> None:
        """The network went another way (it looked at its values): that is no matter where no size changes any more."""
        if any(index >= self.index and changes(item, sizes) for index, (item, sizes) in self.items.items()):
            raise StructureError(
                f"the network takes another path once its widths change: {name} in "
                f"{self.stack[-1] or 'the model'} ({source_line()})."
            )
        self.lost = True

    def _checked(self, pair: tuple[SizeCall, Sizes], name: str, func: Any, args: Any, kwargs: Any) -> Any:
        item, expected = pair
        if family(name) != family(item.name):
            self._lose(name)
            return func(*args, **kwargs)
        literals = given_sizes(item.kind, func, name, args, kwargs, expected)
        if not literals:
            return func(*args, **kwargs)
        whole = None
        if item.kind == "shape":
            given = {axis for axis, _, _ in literals}
            expected = tuple(pair for pair in expected if pair[0] in given)
            whole = whole_shape(name, args, kwargs, expected)
        literals = [pair[-2:] for pair in literals]
        out = rewritten(item.kind, func, name, args, kwargs, expected)
        self.mismatches.append(Mismatch(item, expected, literals, whole))
        return out
