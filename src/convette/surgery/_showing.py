"""Groups of channels as people read them: a text and a picture."""

import html
import re
from collections.abc import Sequence

from convette.surgery._graph import ChannelGraph
from convette.surgery._groups import Group, Member

_SHOWN = 6
_LEGEND = "● makes the channels, ○ reads them; above: how many units; one column: what goes together"
_IN_BLOCK = re.compile(r"(.+)\.\d+\.(.*[^\d.].*)")


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


def _by_blocks(names: Sequence[str]) -> list[str]:
    """Say ``layer2.0.conv2, layer2.1.conv2`` as people do: ``conv2 of 2 blocks of layer2``."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = _IN_BLOCK.fullmatch(name)
        alike.setdefault((found[1], found[2]) if found else ("", name), []).append(name)
    return [
        own[0] if len(own) == 1 else f"{leaf} of {len(own)} blocks of {stage}" for (stage, leaf), own in alike.items()
    ]


def group_line(group: Group) -> str:
    """Describe a group in one line: its size, what makes it, what reads it."""
    made, read = _owners(group.of("producer")), _owners(group.of("consumer"))
    each = max((member.index.shape[1] for member in group.of("producer")), default=1)
    unit = "channels" if each == 1 else f"units of {each} channels"
    # In an un-tied stream: what reads it makes no channels, and what is added to it is read as a sum.
    placed = [name for name in _owners(group.of("index")) if name != group.name]
    over = " + ".join(_by_blocks(made))
    tied = f"tied over {over}" if len(made) > 1 else f"made by {made[0]}" if made else "picked from a stream"
    reads = _listed(_by_blocks(read)) or (f"a stream through {_listed(placed)}" if placed else "nothing")
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

    Filled: the layer makes these channels; ring: it reads them. Above each column is its number of units. Layers are in
    the order they run.
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
    step = max(11.0, min(28.0, (width - label - 20) / max(len(graph), 1)))
    row_height, top = 18, 26 + 7 * max((len(str(group.size)) for group in graph), default=1)
    height = top + row_height * len(rows) + 22
    wide = max(int(label + step * len(graph) + 20), 12 + 7 * len(_LEGEND))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" viewBox="0 0 {wide} {height}" '
        'font-family="ui-monospace, monospace" font-size="11" role="img">',
        f"<title>{len(graph)} groups of channels over {len(rows)} layers</title>",
    ]
    below = top + row_height * len(rows) + 8
    parts.append(f'<text x="6" y="{below}" fill="currentColor">{_LEGEND}</text>')
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
        parts.append(
            f'<text x="{x + 4:.1f}" y="{top - 10}" stroke="none" transform="rotate(-90 {x + 4:.1f} {top - 10})">'
            f"{group.size}</text>"
        )
        y1, y2 = top + row_height * first, top + row_height * last
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1}" y2="{y2}" stroke-width="1.5" />')
        for row, role in own:
            fill = "" if role == "producer" else ' fill="white"'
            parts.append(f'<circle cx="{x:.1f}" cy="{top + row_height * row}" r="4"{fill} />')
        parts.append("</g>")
    parts.append("</svg>")
    return "\n".join(parts)
