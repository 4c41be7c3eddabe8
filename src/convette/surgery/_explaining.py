"""Saying in words what goes with a channel, and why."""

from convette.errors import StructureError, did_you_mean
from convette.surgery._graph import ChannelGraph


def explain_channel(graph: ChannelGraph, module_name: str, index: int) -> str:
    """Return a text: the unit that output channel `index` of a module belongs to, what it owns, what ties it."""
    making = [slot for slot in reversed(graph.slots()) if slot.role in ("producer", "index")]
    rows = {slot.module: slot for slot in making}
    owners = {slot.parameter.rpartition(".")[0]: slot for slot in making}
    slot = owners.get(module_name) or rows.get(module_name)
    if slot is None:
        raise StructureError(f"no labelled layer is called {module_name!r}.{did_you_mean(module_name, owners)}")
    if not 0 <= index < len(slot.labels):
        raise StructureError(f"{module_name!r} has channels 0 to {len(slot.labels) - 1}; asked for {index}.")
    root = int(graph.roots[slot.labels[index]])
    head = f"channel {index} of {module_name}"
    ties = _ties(graph, root, slot.labels[index : index + 1])
    if root == 0:
        return "\n".join([f"{head} is fixed.", *ties])
    verbs = {"producer": "made by", "consumer": "read by", "affine": "scaled by", "index": "placed by"}
    lines = []
    for member in graph.slots():
        own = (graph.roots[member.labels] == root).nonzero().view(-1).tolist()
        if own:
            shown = ", ".join(map(str, own[:8])) + (f", ... ({len(own)})" if len(own) > 8 else "")
            lines.append(f"  {verbs[member.role]} {member.parameter} dim {member.dim}: {shown}")
    return "\n".join([f"{head} goes with:", *lines, *ties])


def _ties(graph: ChannelGraph, root: int, labels: object) -> list[str]:
    found: dict[str, None] = {}
    for left, right, why in graph.store.pairs():
        hit = graph.roots[left] == root
        # For fixed channels every freezing call would be listed: name those that touch this one's own label.
        if root == 0:
            hit = hit & ((left == labels) | (right == labels))
        if bool((hit & (left != right)).any()):
            name, module = graph.records.calls[why]
            found[f"  {'fixed' if root == 0 else 'tied'} by {name} in {module or 'the model'}"] = None
    return list(found)
