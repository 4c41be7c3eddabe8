"""From a set of kept labels to the `Shrink` edit: parameters, module attributes, sizes written in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from convette.surgery._attributes import Attributes, HeldSizes
from convette.surgery._cutting import KeptIndices
from convette.surgery._edits import Shrink, find_module
from convette.surgery._graph import ChannelGraph
from convette.surgery._plan import Cut, as_key, follows, plan_of
from convette.surgery._probing import probed as _probed
from convette.surgery._records import SizeCall
from convette.surgery._sizes import Expectation
from convette.surgery._walk import Walk, collecting_later


def shrink_edit(graph: ChannelGraph, keep: Tensor) -> Shrink:
    """Return the edit that leaves what `keep` (Bool, by root) says.

    Where sizes are written in Python, the network is run to find what holds them; once for each set of sizes: cuts
    that leave as many channels everywhere, if others, need the same.
    """
    with collecting_later():
        return _shrink_edit(graph, keep)


def _shrink_edit(graph: ChannelGraph, keep: Tensor) -> Shrink:
    plan = plan_of(graph)
    cut = Cut(plan, keep)
    kept, lengths = plan.kept(cut)
    attributes, free = plan.held.after(lengths, plan.new_groups(cut))
    last = {id(index): end for index, end in zip(cut.indices, cut.last, strict=True)}
    edit = Shrink(KeptIndices(kept, last), attributes, free)
    items = {}
    if plan.items:
        expectation = Expectation(graph.roots, keep, plan.vectors)
        for item in plan.items:
            sizes = expectation.sizes(item)
            if sizes is not None:
                items[item.call] = (item, sizes)
    if not lengths or not (items or graph.records.unseen):
        return edit
    key = as_key(cut, items)
    if key not in plan.known:
        edit = _probed(graph, edit, items)
        plan.remember(key, edit.attributes, edit.rewrites)
    attributes, rewrites = plan.known[key]
    # A dict of its own for each edit.
    attributes = {module: dict(values) for module, values in attributes.items()}
    return replace(edit, attributes=attributes, rewrites=rewrites)


def _new_groups(graph: ChannelGraph, expectation: Expectation) -> dict[str, int]:
    """Return how many groups each grouped convolution or normalisation has left, by module."""
    result = {}
    for item in graph.records.sizes:
        if item.kind == "groups":
            sizes = expectation.sizes(item)
            if sizes is not None:
                result[item.module] = sizes[0][0]
    return result


def _follows_from_class(model: nn.Module, item: SizeCall) -> bool:
    """Tell whether the size in a call comes from an attribute that `HeldSizes` takes care of."""
    return follows(find_module(model, item.module), item)


def _static_attributes(
    model: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]], groups: Mapping[str, int]
) -> tuple[Attributes, tuple[str, ...]]:
    """Return the sizes modules must hold once parameters keep the indices in `kept`, and the attentions with fewer
    heads."""
    return HeldSizes(Walk(model), kept).after({slot: len(indices) for slot, indices in kept.items()}, groups)
