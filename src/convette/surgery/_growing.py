"""From a plan (how many new units in which group) to the `Grow` edit, proved on the graph's example."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convette.errors import StructureError
from convette.surgery._edits import Shrink, find_module, find_tensor
from convette.surgery._graph import ChannelGraph
from convette.surgery._groups import Group, Member
from convette.surgery._grow import MODES, Grow, Scale, Widening, old_places
from convette.surgery._labels import narrowed, normalised, varying
from convette.surgery._realigning import realigned
from convette.surgery._records import Layers, SizeCall
from convette.surgery._shrinking import _follows_from_class, _new_groups, _probed, _static_attributes, shrink_edit
from convette.surgery._sizes import Expectation, Sizes
from convette.surgery._trial import trial_error
from convette.surgery._untie import Scatter

Plan = Mapping[str, int | Sequence[int]]


def grow(
    graph: ChannelGraph,
    plan: Plan,
    mode: str = "split",
    *,
    seed: int = 0,
    noise: float = 0.0,
    exact: bool = True,
    tolerance: float = 1e-5,
) -> Grow:
    """Return the edit that adds units to groups while the network goes on computing the same.

    Channels that are added to an un-tied stream grow by "zero_in", those read from one by "zero_out": they take the
    first places of the stream that are free.

    `plan` maps a group's name to a number of new units (their sources are drawn by `seed`, each unit equally often
    as far as possible) or to the list of source units, one for each new unit. New units go to the end of the group,
    or of each of its equal parts. Modes, `noise`: see `Grow`. The edit is tried and proved on the graph's example;
    the model is as before when this returns.

    Raises `StructureError` for a plan that does not fit, a size in Python that cannot be changed, or outputs that
    differ by more than the relative `tolerance`: statistics over channels (layer norm, attention scores) change with
    their number. With ``exact=False`` such an edit is returned with ``preserves=False``.
    Cost: three forward passes, more where sizes are held in Python.
    """
    if mode not in MODES:
        raise StructureError(f"mode {mode!r} is none of {', '.join(MODES)}.")
    if not 0 <= noise <= 1 or (noise and mode != "split"):
        raise StructureError(f"noise {noise}: a number from 0 to 1, for the mode 'split' only.")
    draw = torch.Generator().manual_seed(seed)
    sources = {name: _sources(graph[name], wanted, draw) for name, wanted in plan.items()}
    widened = _widenings(graph, sources, mode)
    expectation = Growth(graph.roots, _counts(graph, sources))
    sizes = {key: range(find_tensor(graph.model, key[0]).shape[key[1]] + len(w.new)) for key, w in widened.items()}
    groups = _new_groups(graph, expectation)
    attributes, heads = _static_attributes(graph.model, sizes, groups)  # type: ignore[arg-type]
    edit = Grow(widened, mode, seed, float(noise), attributes, heads)
    items: dict[int, tuple[SizeCall, Sizes]] = {}
    for item in [*graph.records.sizes, *getattr(graph.records, "scalars", {}).values()]:
        if not _follows_from_class(graph.model, item):
            needed = expectation.sizes(item)
            if needed is not None:
                items[item.call] = (item, needed)
    if items and widened:
        edit = _probed(graph, edit, items)  # type: ignore[arg-type,assignment]
    alive = _alive(graph, edit, plan) if mode == "zero_in" else edit
    if alive != edit and trial_error(graph.model, [alive], graph.example, tolerance) <= tolerance:
        return alive
    return _proved(graph, edit, sources, exact, tolerance)  # type: ignore[arg-type]


def _alive(graph: ChannelGraph, edit: Grow, plan: Plan) -> Grow:
    """Return `edit` with the weights in front of a norm drawn at random: where both are zero, neither learns."""
    weights = {
        (member.parameter, member.dim)
        for name in plan
        if graph[name].of("affine")
        for member in graph[name].of("producer")
        if find_tensor(graph.model, member.parameter).ndim > 1
    }
    widened = {
        key: dataclasses.replace(item, role="alive") if key in weights else item for key, item in edit.widened.items()
    }
    return dataclasses.replace(edit, widened=widened)


def _sources(group: Group, wanted: int | Sequence[int], draw: torch.Generator) -> list[list[int]]:
    """Return for each part of a group the source units of its new units."""
    parts, size = group.constraints.parts, group.size
    width = size // parts
    if isinstance(wanted, bool) or (isinstance(wanted, int) and wanted < 0):
        raise StructureError(f"group {group.name!r}: {wanted} new units.")
    if isinstance(wanted, int):
        if wanted % parts:
            raise StructureError(f"group {group.name!r}: as many units must be new in each of its {parts} parts.")
        many = wanted // parts
        chosen = [torch.randperm(width, generator=draw) for _ in range(-(-many // width))]
        # The same places in every part: parts of one shape stay of one make.
        places = torch.cat(chosen)[:many].sort().values.tolist() if many else []
        return [[part * width + place for place in places] for part in range(parts)]
    units = [int(unit) for unit in wanted]
    if any(not 0 <= unit < size for unit in units):
        raise StructureError(f"group {group.name!r} has units 0 to {size - 1}; a source is {max(units)}.")
    result = [[unit for unit in units if unit // width == part] for part in range(parts)]
    if len({len(part) for part in result}) > 1:
        raise StructureError(f"group {group.name!r}: as many units must be new in each of its {parts} parts.")
    return result


def _widenings(
    graph: ChannelGraph, sources: Mapping[str, list[list[int]]], mode: str
) -> dict[tuple[str, int], Widening]:
    inserts: dict[tuple[str, int], dict[int, list[int]]] = {}  # slot -> old place -> sources of what follows it
    roles: dict[tuple[str, int], str] = {}
    places: dict[tuple[str, int], list[int]] = {}
    for name, parts in sources.items():
        group = graph[name]
        for member in group.members:
            key = (member.parameter, member.dim)
            if member.role == "index" and any(parts):
                places[key] = _free_places(graph, name, member, len(parts[0]), mode)
            roles[key] = member.role
            for number, units in enumerate(parts):
                last = (number + 1) * (group.size // len(parts)) - 1
                if units:
                    _insert(inserts.setdefault(key, {}), member, last, units)
    result: dict[tuple[str, int], Widening] = {}
    same: dict[Widening, Widening] = {}
    for key, after in inserts.items():
        new, source = [], []
        for place in sorted(after):
            new += range(place + 1 + len(source), place + 1 + len(source) + len(after[place]))
            source += after[place]
        made = Widening(roles[key], tuple(new), tuple(places.get(key, source)))
        result[key] = same.setdefault(made, made)
    return result


def _free_places(graph: ChannelGraph, name: str, member: Member, count: int, mode: str) -> list[int]:
    """Return the first `count` places of an un-tied stream that its index `member` does not name."""
    index = find_module(graph.model, member.parameter.rpartition(".")[0])
    needed = "zero_in" if isinstance(index, Scatter) else "zero_out"
    if mode != needed:
        raise StructureError(f"group {name!r} is part of an un-tied stream: its channels grow by mode {needed!r} only.")
    taken = set(index.index.tolist())  # type: ignore[union-attr,operator]
    free = [place for place in range(int(index.width)) if place not in taken]  # type: ignore[arg-type]
    if len(free) < count:
        raise StructureError(
            f"group {name!r} is part of an un-tied stream of {index.width} channels, of which {len(free)} are free."
        )
    return free[:count]


def _insert(after: dict[int, list[int]], member: Member, last: int, units: Sequence[int]) -> None:
    """Put copies of `units` behind each stretch of entries of the `last` unit, each as long as the stretch."""
    own = member.index[last].tolist()
    starts = [k for k, place in enumerate(own) if k == 0 or place != own[k - 1] + 1]
    for start, end in zip(starts, [*starts[1:], len(own)], strict=True):
        row = after.setdefault(own[end - 1], [])
        for unit in units:
            row += member.index[unit][start:end].tolist()


def _counts(graph: ChannelGraph, sources: Mapping[str, list[list[int]]]) -> Tensor:
    """Return for each root how many places one of its places becomes: the last unit of a part is followed by new."""
    counts = torch.ones(len(graph.roots), dtype=torch.int64)
    slots = {(slot.parameter, slot.dim): slot for slot in graph.slots()}
    for name, parts in sources.items():
        group = graph[name]
        first = group.members[0]
        for number, units in enumerate(parts):
            last = (number + 1) * (group.size // len(parts)) - 1
            place = first.index[last][0]
            root = graph.roots[slots[first.parameter, first.dim].labels[place]]
            counts[root] += len(units)
    return counts


class Growth(Expectation):
    """What the noted calls must be given when some labels are followed by new ones."""

    def __init__(self, roots: Tensor, counts: Tensor) -> None:
        """`counts`: how many places one place of each root becomes."""
        super().__init__(roots, counts == 1)
        self.counts = counts

    def along(self, layers: Layers, axis: int) -> Tensor | None:
        """Return how many places each place of `axis` becomes, None if one each."""
        result: Tensor | None = None
        for layer in layers:
            if axis not in varying(layer):
                continue
            roots = normalised(self.roots[narrowed(layer)])
            if varying(roots) != (axis,):
                continue
            counts = self.counts[roots[tuple(slice(None) if a == axis else 0 for a in range(roots.ndim))]]
            result = counts if result is None else torch.maximum(result, counts)
        return None if result is None or bool((result == 1).all()) else result

    def _groups(self, item: SizeCall) -> Sizes | None:
        _, heads = item.given
        counts = self.counts[self.roots[heads]]
        return None if bool((counts == 1).all()) else ((int(counts.sum()),),)


def _proved(
    graph: ChannelGraph, edit: Grow, sources: Mapping[str, list[list[int]]], exact: bool, tolerance: float
) -> Grow:
    error = trial_error(graph.model, [edit], graph.example, tolerance)
    if error <= tolerance:
        return edit
    again = realigned(graph, edit, sources)
    if again is not None:
        other = trial_error(graph.model, [again], graph.example, tolerance)
        if other <= tolerance or other < error:
            edit, error = again, other
        if error <= tolerance:
            return edit
    if not exact:
        return dataclasses.replace(edit, preserves=False)
    touched = [f"{name} in {module or 'the model'}" for name, module in graph.scopes]
    why = f" statistics over channels change with their number ({', '.join(touched[:3])});" if touched else ""
    raise StructureError(
        f"growing by {edit.mode!r} changes the outputs (relative error {error:.1e} over {tolerance:.0e}):{why} try "
        f"another mode ({', '.join(mode for mode in MODES if mode != edit.mode)}), as many copies of every unit of "
        "the group, or exact=False."
    )


def ungrow(graph: ChannelGraph, edit: Grow) -> tuple[Scale | Shrink, ...]:
    """Return the edits that take `edit` back on the grown network that `graph` traces: bitwise, unless it was trained.

    The new units are cut off; after a split what reads their sources is whole again first (bitwise without noise:
    the parts are powers of two; with noise up to what the noise moved). Raises `StructureError` where the graph is
    not one of the grown network.
    """
    keep = torch.ones(len(graph.roots), dtype=torch.bool)
    slots = {(slot.parameter, slot.dim): slot for slot in graph.slots()}
    factors: dict[tuple[str, int], tuple[tuple[int, float], ...]] = {}
    for key, item in edit.widened.items():
        slot = slots.get(key)
        if slot is None or item.new[-1] >= len(slot.labels):
            raise StructureError(f"{key[0]!r} is not as wide as the edit made it; trace the grown network.")
        keep[graph.roots[slot.labels[list(item.new)]]] = False
        if edit.mode == "split" and item.role == "consumer":
            size = len(slot.labels) - len(item.new)
            places = old_places(item, size)
            shares = item.shares(size)[places]
            shared = (shares != 1).nonzero().view(-1).tolist()
            factors[key] = tuple((int(places[k]), float(1 / shares[k])) for k in shared)
    if not bool(keep[0]):
        raise StructureError("some of the units to remove are fixed by now.")
    shrink = shrink_edit(graph, keep)
    return (Scale(factors), shrink) if factors else (shrink,)
