"""From solved labels to groups: which units are of one make, and what each owns (worked out when it is asked for)."""

import numpy as np
import torch
from torch import Tensor

from convette.surgery._labels import LabelStore, Slot

# Roles without which a unit is nobody's to remove.
_MAKING = ("producer", "index")
_NEVER = np.iinfo(np.int64).max


class Grouping:
    """Units (labels with one root) gathered into groups of one make: those that touch the same slots, as often each.

    `names`: the groups, in order of their first producer; `units`: the roots of each. `members` says what a group's
    units own in which slots: (slot, index) pairs, index of shape (units, entries each).
    """

    def __init__(self, store: LabelStore, roots: np.ndarray) -> None:
        """Find the groups."""
        self.slots = [slot for slot in store.slots.values() if slot.labels.shape[0] > 1]
        self.names: list[str] = []
        self.units: dict[str, Tensor] = {}
        self._makes: dict[str, int] = {}
        self._table: dict[int, list[tuple[int, np.ndarray]]] | None = None
        if self.slots:
            self._find(roots)

    def _find(self, roots: np.ndarray) -> None:
        # Slots that share one list of labels are looked at once.
        columns: dict[int, int] = {}
        self._column = [columns.setdefault(id(slot.labels), len(columns)) for slot in self.slots]
        unique: dict[int, Tensor] = {}
        for slot in self.slots:
            unique.setdefault(id(slot.labels), slot.labels)
        labels = list(unique.values())
        self._sizes = np.array([tensor.shape[0] for tensor in labels])
        self._root = root = roots[torch.cat(labels).numpy()]
        ends = np.cumsum(self._sizes)
        self._starts = ends - self._sizes
        # A unit's make: which slots it touches, and how often. A random number a slot, added up, tells makes apart.
        numbers = np.random.default_rng(0).integers(1, 1 << 62, size=len(self.slots), dtype=np.uint64)
        of_column = np.zeros(len(labels), dtype=np.uint64)
        np.add.at(of_column, self._column, numbers)
        making = np.zeros(len(labels), dtype=bool)
        first = np.full((2, len(labels)), _NEVER)  # to make the channels at all; to compute them
        for place, (slot, column) in enumerate(zip(self.slots, self._column, strict=True)):
            if slot.role in _MAKING:
                making[column] = True
                first[:, column] = np.minimum(first[:, column], [place, place if slot.role == "producer" else _NEVER])
        self._of = of = np.repeat(np.arange(len(labels)), self._sizes)
        produced = np.zeros(len(roots), dtype=bool)
        produced[root[making[of]]] = True
        produced[0] = False
        make = np.zeros(len(roots), dtype=np.uint64)
        np.add.at(make, root, of_column[of])
        found = np.flatnonzero(produced)
        if not len(found):
            return
        kinds, kind = np.unique(make[found], return_inverse=True)
        # By root: the number of its make, -1 for none.
        self._kind = np.full(len(roots), -1)
        self._kind[found] = kind
        earliest = np.full((2, len(kinds)), _NEVER)
        rows = making[of] & produced[root]
        for row in range(2):
            np.minimum.at(earliest[row], self._kind[root[rows]], first[row][of[rows]])
        shown = np.where(earliest[1] < _NEVER, earliest[1], earliest[0])
        order = np.argsort(kind, kind="stable")
        pieces = np.split(found[order], np.cumsum(np.bincount(kind))[:-1])
        taken: dict[str, int] = {}
        for number in sorted(range(len(kinds)), key=lambda n: (earliest[0][n], pieces[n][0])):
            if len(pieces[number]) > 1:
                name = _name(self.slots[shown[number]], taken)
                self.names.append(name)
                self.units[name] = torch.from_numpy(pieces[number])
                self._makes[name] = number

    def members(self, name: str) -> list[tuple[Slot, Tensor]]:
        """Return what the units of a group own, slot by slot in order of use."""
        if self._table is None:
            self._table = self._sorted()
        size = len(self.units[name])
        columns = {column: torch.from_numpy(places).view(size, -1) for column, places in self._table[self._makes[name]]}
        return [
            (slot, columns[column]) for slot, column in zip(self.slots, self._column, strict=True) if column in columns
        ]

    def _sorted(self) -> dict[int, list[tuple[int, np.ndarray]]]:
        """Return for each make the columns it touches, and the places there, unit by unit."""
        kind = self._kind[self._root]
        used = np.flatnonzero(kind >= 0)
        kind, of, root = kind[used], self._of[used], self._root[used]
        place = used - self._starts[of]
        order = np.lexsort((place, root, of, kind))
        kind, of, place = kind[order], of[order], place[order]
        edges = np.flatnonzero(np.r_[True, (kind[1:] != kind[:-1]) | (of[1:] != of[:-1])])
        result: dict[int, list[tuple[int, np.ndarray]]] = {}
        for start, end in zip(edges, np.r_[edges[1:], len(kind)], strict=True):
            result.setdefault(int(kind[start]), []).append((int(of[start]), place[start:end].copy()))
        return result


def _name(slot: Slot, taken: dict[str, int]) -> str:
    owner, _, leaf = slot.parameter.rpartition(".")
    # Several parameters of one module can produce (a bare parameter beside a weight): the module's name will do.
    plain = leaf in ("weight", "bias", "index") or leaf.startswith("weight_ih_l")
    name = owner if plain and owner else slot.parameter
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}:{taken[name]}"
