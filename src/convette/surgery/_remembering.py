"""Where the sizes written in Python of a network were found to be held: a second selection starts from there.

What is remembered is a guess like any other: the shrunk network is run with it, and a guess that is wrong is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convette.surgery._calls import family
from convette.surgery._edits import Rewrite, Shrink
from convette.surgery._records import SizeCall
from convette.surgery._sizes import Mismatch, changes
from convette.surgery._walk import Walk

Items = Mapping[int, tuple[SizeCall, Any]]
Place = tuple[str, str, int]


@dataclass
class Remembered:
    """Which attributes hold which number of which call, and which calls are rewritten.

    `attributes`: (module, attribute) -> (call, the number it was given, while learning the one it had to be given and
    later the position of that among the sizes of the call). `rewrites`: place -> (call, for shapes the axes given).
    """

    attributes: dict[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    rewrites: dict[Place, tuple[int, frozenset[int]]] = field(default_factory=dict)

    def note(self, mismatch: Mismatch, held: Mapping[str, tuple[str, str, Any] | None]) -> None:
        """Note where the numbers of a call were found, by the text of each."""
        for (given, new), found in zip(mismatch.literals, held.values(), strict=False):
            if found is not None and isinstance(given, int) and isinstance(new, int):
                self.attributes.setdefault((found[0], found[1]), (mismatch.item.call, given, new))

    def of(self, trial: Shrink, edit: Shrink, items: Items) -> "Remembered | None":
        """Return what was learned from a trial that worked; None where it cannot be put into numbers."""
        result = Remembered()
        for module, values in trial.attributes.items():
            for key in values.keys() - edit.attributes.get(module, {}).keys():
                call, given, new = self.attributes.get((module, key), (-1, 0, 0))
                numbers = _numbers(items[call][1]) if call in items else []
                if new not in numbers:
                    return None
                result.attributes[module, key] = (call, given, numbers.index(new))
        calls = {(item.module, family(item.name), item.occurrence): call for call, (item, _) in items.items()}
        for rewrite in trial.rewrites:
            place = (rewrite.module, rewrite.function, rewrite.occurrence)
            if place not in calls:
                return None
            axes = frozenset(int(axis) for axis, *_ in rewrite.sizes) if rewrite.kind == "shape" else frozenset()
            result.rewrites[place] = (calls[place], axes)
        return result

    def put_right(self, edit: Shrink, items: Items, walk: Walk) -> Shrink | None:
        """Return `edit` with the remembered sizes as another selection needs them; None where they do not fit."""
        attributes = {module: dict(values) for module, values in edit.attributes.items()}
        for (module, key), (call, given, position) in self.attributes.items():
            if call not in items:
                continue
            held, numbers = vars(walk.module(module)).get(key), _numbers(items[call][1])
            if not isinstance(held, int) or isinstance(held, bool) or not held or position >= len(numbers):
                return None
            times, rest = divmod(given, held)
            new, more = divmod(int(numbers[position]), times or 1)
            if rest or more:
                return None
            if new != held:
                attributes.setdefault(module, {})[key] = new
        rewrites = []
        for place, (call, axes) in self.rewrites.items():
            if call not in items or not changes(*items[call]):
                continue
            item, sizes = items[call]
            if item.kind == "shape":
                sizes = tuple(pair for pair in sizes if pair[0] in axes)
            rewrites.append(Rewrite(*place, item.kind, sizes))
        return replace(edit, attributes=attributes, rewrites=tuple(rewrites))


def _numbers(sizes: Any) -> list[Any]:
    if isinstance(sizes, tuple | list):
        return [number for part in sizes for number in _numbers(part)]
    return [sizes]
