"""Successive cuts as one, for files that have to be small: the same network, without what it was in between."""

from collections.abc import Iterable

from convette.surgery._edits import Edit, Shrink


def merged(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits that make the same of a network, with `Shrink` edits that follow one another as one."""
    result: list[Edit] = []
    for edit in edits:
        last = result[-1] if result else None
        both = _as_one(last, edit) if isinstance(last, Shrink) and isinstance(edit, Shrink) else None
        if both is None:
            result.append(edit)
        else:
            result[-1] = both
    return result


def _as_one(first: Shrink, second: Shrink) -> Shrink | None:
    """Return the edit that keeps what both keep; None where the second does not fit behind the first."""
    kept = dict(first.kept)
    for slot, indices in second.kept.items():
        before = kept.get(slot)
        if before is None:
            kept[slot] = indices
        elif indices and indices[-1] < len(before):
            kept[slot] = tuple(before[index] for index in indices)
        else:
            return None
    # Sizes are said as they are to be, not by how much less: the later ones hold.
    attributes = {name: dict(values) for name, values in first.attributes.items()}
    for name, values in second.attributes.items():
        attributes.setdefault(name, {}).update(values)
    rewrites = {(item.module, item.function, item.occurrence): item for item in (*first.rewrites, *second.rewrites)}
    heads = tuple(dict.fromkeys((*first.free_heads, *second.free_heads)))
    return Shrink(kept, attributes, heads, tuple(rewrites.values()))
