"""Groups of channels as people read them: a text and a picture."""

import html
from collections.abc import Sequence

from convette.surgery._graph import ChannelGraph
from convette.surgery._groups import Group, Member

_SHOWN = 6


def _owner(member: Member) -> str:
    owner, _, leaf = member.parameter.rpartition(".")
    return owner if leaf in ("weight", "bias", "index") and owner else member.parameter


def _owners(members: Sequence[Member]) -> list[str]:
    return list(dict.fromkeys(_owner(member) for member in members))


def _listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Join names, the middle of a long list left out."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[: shown - 1])}, ... {names[-1]} ({len(names)})"


def group_line(group: Group) -> str:
    """Describe a group in one line: its size, what makes it, what reads it."""
    made, read = _owners(group.of("producer")), _owners(group.of("consumer"))
    each = max((member.index.shape[1] for member in group.of("producer")), default=1)
    unit = "channels" if each == 1 else f"units of {each} channels"
    # In an un-tied stream: what reads it makes no channels, and what is added to it is read as a sum.
    placed = [name for name in _owners(group.of("index")) if name != group.name]
    tied = f"tied over {_listed(made)}" if len(made) > 1 else f"made by {made[0]}" if made else "picked from a stream"
    reads = _listed(read) or (f"a stream through {_listed(placed)}" if placed else "nothing")
    return f"{group.name}: {group.size} {unit}, {tied}; read by {reads}"


def units_text(graph: ChannelGraph) -> str:
    """Return one line a group, then what is fixed and why: what ``convette show MODEL --units`` prints."""
    lines = [f"{len(graph)} groups, {graph.units} units that can be removed"]
    lines += [f"  {group_line(group)}" for group in graph]
    lines += [f"  {name} stays whole: {why}" for name, why in graph.kept.items()]
    if graph.scopes:
        where = _listed([f"{name} in {module or 'the model'}" for name, module in graph.scopes])
        lines.append(f"statistics over removable channels (removing one changes the others): {where}")
    if graph.frozen:
        lines.append("channels fixed because nothing is known of:")
        lines += [f"  {operator}" for operator in graph.frozen]
    return "\n".join(lines)


def units_svg(graph: ChannelGraph, width: int = 960) -> str:
    """Return a picture (SVG text) of the coupled layers: a row a layer, a column a group, a mark where they meet.

    Filled: the layer makes these channels; ring: it reads them. Layers are in the order they run.
    """
    layers: dict[str, int] = {}
    marks: list[tuple[str, int, str]] = []
    for column, group in enumerate(graph):
        for role in ("producer", "consumer", "index"):
            for name in _owners(group.of(role)):
                layers.setdefault(name, len(layers))
                marks.append((name, column, role))
    order = {module: number for number, (_, module) in enumerate(reversed(graph.records.calls))}
    rows = {name: row for row, name in enumerate(sorted(layers, key=lambda name: (-order.get(name, -1), layers[name])))}
    label = 12 + 7 * max((len(name) for name in rows), default=1)
    step = max(8.0, min(28.0, (width - label - 20) / max(len(graph), 1)))
    height, row_height, top = 40 + 18 * len(rows), 18, 26
    wide = int(label + step * len(graph) + 20)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" viewBox="0 0 {wide} {height}" '
        'font-family="ui-monospace, monospace" font-size="11" role="img">',
        f"<title>{len(graph)} groups of channels over {len(rows)} layers</title>",
    ]
    for name, row in rows.items():
        y = top + row_height * row
        parts.append(f'<line x1="{label}" x2="{wide - 10}" y1="{y}" y2="{y}" stroke="#8884" />')
        parts.append(
            f'<text x="{label - 6}" y="{y + 4}" text-anchor="end" fill="currentColor">{html.escape(name)}</text>'
        )
    for column, group in enumerate(graph):
        x = label + step * (column + 0.5)
        hue = 137.5 * column % 360
        own = [(rows[name], role) for name, at, role in marks if at == column]
        first, last = min(row for row, _ in own), max(row for row, _ in own)
        parts.append(f'<g stroke="hsl({hue:.0f} 60% 45%)" fill="hsl({hue:.0f} 60% 45%)">')
        parts.append(f"<title>{html.escape(group_line(group))}</title>")
        y1, y2 = top + row_height * first, top + row_height * last
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1}" y2="{y2}" stroke-width="1.5" />')
        for row, role in own:
            fill = "" if role == "producer" else ' fill="none"'
            parts.append(f'<circle cx="{x:.1f}" cy="{top + row_height * row}" r="4"{fill} />')
        parts.append("</g>")
    parts.append("</svg>")
    return "\n".join(parts)
