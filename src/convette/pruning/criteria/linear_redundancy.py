"""Linear redundancy: what a unit is worth once the others have taken over its weights (Shah et al., arXiv 2005.14070).

The selection rule and the treatment of convolutions are reconstructed from the paper's idea; the algebra is checked
against explicit least squares in the tests. `convette.pruning.redistribute` is the repair that goes with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.pruning._moments import Gathering, Moments, as_matrix, layout_of
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores, tensors_of
from convette.pruning.criteria._observing import Reader, batches_of, find_readers, hooked, run, scoring
from convette.surgery import ChannelGraph

WIDEST = 8192


def linear_redundancy(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    rule: Literal["damage", "dependence"] = "damage",
    ridge: float = 1e-6,
    rows: int = 4096,
) -> dict[str, Tensor]:
    r"""Score units by the damage of deleting them one after another, the rest taking over their weights each time.

    With :math:`Q = (E[z z^\top] + \epsilon I)^{-1}` of what a reader reads behind norm, activation and pooling, the
    best linear prediction of unit j from all others and its mean squared residual are

    .. math:: \alpha_i = -Q_{ij} / Q_{jj}, \qquad r_j = 1 / Q_{jj}, \qquad
        d_j = \sum_{readers} \frac{r_j \, \lVert W_{:,j} \rVert^2}{E \lVert W z \rVert^2}

    The unit with the least d goes first (``rule="damage"``; ``"dependence"``: the least :math:`r_j / E z_j^2`), the
    reader's weights become :math:`W_{:,i} + \alpha_i W_{:,j}`, Q is downdated, and so on to the last. The score of a
    unit is its d when its turn comes, never less than those before it: of two equal units the first costs nothing, the
    second all. Units of several inputs (flattened maps, heads) go as blocks. `ridge` times the mean second moment is
    :math:`\epsilon`; `rows` positions are taken from each batch.

    Returns one score a unit of every group that a convolution, linear layer or attention projection reads, CPU float32,
    larger = keep. Raises `UsageError` without calibration data, `StructureError` for activations that are not finite.
    Costs one forward pass, an inverse of n x n a reader and a downdate a unit. Pays with `redistribute` only. Source:
    arXiv 2005.14070.
    """
    check_values("criterion linear_redundancy", linear_redundancy, rule=rule)
    tensors, modules = tensors_of(model), dict(model.named_modules(remove_duplicate=False))
    batches = batches_of(calibration, "linear_redundancy")
    readers = _readable(find_readers(model, graph), tensors)
    by_parameter = {reader.parameter: [reader] for found in readers.values() for reader in found}
    layouts = {
        name: layout_of(modules[found[0].module], tensors[name], "channels") for name, found in by_parameter.items()
    }
    gathering = Gathering(layouts, rows, "criterion linear_redundancy")

    def take(watched: list[tuple[str, Reader]], value: Tensor) -> None:
        for name, reader in watched:
            gathering.note(name, modules[reader.module], value)

    with scoring(model), hooked(model, by_parameter, take), torch.no_grad():
        for images, _ in batches:
            run(model, images)
    scores, whole = {}, {}
    for group in graph.groups:
        found = [r for r in readers.get(group.name, ()) if r.parameter in gathering.moments]
        for reader in found:
            if reader.parameter not in whole:  # a concatenation is read once for many groups
                whole[reader.parameter] = _matrices(reader, gathering, tensors[reader.parameter], ridge)
        states = [_restricted(reader, *whole[reader.parameter]) for reader in found]
        if states:
            scores[group.name] = eliminate(states, group.size, rule)
    return finite_scores(scores, "linear_redundancy", graph)


def _readable(readers: dict[str, list[Reader]], tensors: dict[str, Tensor]) -> dict[str, list[Reader]]:
    kept = {}
    for name, found in readers.items():
        fitting = [r for r in found if r.through != "output" and tensors[r.parameter].shape[1] <= WIDEST]
        if fitting:
            kept[name] = fitting
    return kept


@dataclass
class ReaderState:
    """One reader while units of a group go: inverse second moments, ``W' W`` and second moments of its inputs, of the
    group's own only: what deleting its units does to these needs no others.

    Unit u owns the `width` columns from ``width * u`` on; `energy` is the mean squared output at the start.
    """

    inverse: Tensor
    weights: Tensor
    moments: Tensor
    width: int
    energy: float

    def damage(self, rule: str) -> Tensor:
        """Return the damage of deleting each unit now."""
        own = self._blocks(self.inverse)
        if self.width == 1:
            residual = 1 / own.flatten()
            if rule == "dependence":
                return residual / self._blocks(self.moments).flatten().clamp_min(1e-30)
            return residual * self._blocks(self.weights).flatten() / self.energy
        residual = torch.linalg.inv(own)
        if rule == "dependence":
            spread = self._blocks(self.moments).diagonal(dim1=1, dim2=2).sum(dim=1)
            return residual.diagonal(dim1=1, dim2=2).sum(dim=1) / spread.clamp_min(1e-30)
        return (residual * self._blocks(self.weights).transpose(1, 2)).sum(dim=(1, 2)) / self.energy

    def remove(self, unit: int) -> None:
        """Let the others take over the weights of `unit`; its own columns are empty until `compact`."""
        gone = slice(unit * self.width, (unit + 1) * self.width)
        across = self.inverse[gone]
        alpha = -torch.linalg.solve(across[:, gone], across) if self.width > 1 else -across / across[0, gone]
        alpha[:, gone] = 0
        # W' W of the new weights, in one pass: c a + a' c' with c = M_j + a' M_jj / 2.
        half = self.weights[:, gone] + alpha.T @ self.weights[gone, gone] / 2
        self.weights.addmm_(torch.cat([half, alpha.T], dim=1), torch.cat([alpha, half.T]))
        self.inverse.addmm_(across.T.clone(), alpha)
        for matrix, own in ((self.inverse, 1.0), (self.weights, 0.0)):
            matrix[gone], matrix[:, gone] = 0, 0
            matrix[gone, gone] = own * torch.eye(self.width, dtype=matrix.dtype)  # keeps blocks invertible

    def compact(self, units: Tensor) -> None:
        """Keep the columns of `units` only."""
        columns = (units.unsqueeze(1) * self.width + torch.arange(self.width)).flatten()
        for name in ("inverse", "weights", "moments"):
            setattr(self, name, getattr(self, name)[columns][:, columns])

    def _blocks(self, matrix: Tensor) -> Tensor:
        units = len(matrix) // self.width
        return matrix.view(units, self.width, units, self.width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _matrices(
    reader: Reader, gathering: Gathering, weight: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return inverse second moments, ``W' W``, second moments and mean squared output of all inputs of a reader."""
    layout, moments = gathering.layouts[reader.parameter], gathering.moments[reader.parameter]
    second = _whole(moments)
    matrix = as_matrix(weight, layout).cpu()
    squares = torch.block_diag(*(part.T @ part for part in matrix))
    scale = second.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(second + ridge * scale * torch.eye(len(second), dtype=second.dtype))
    energy = float((squares * second).sum().clamp_min(1e-30))
    return inverse, squares, second, energy


def _restricted(reader: Reader, inverse: Tensor, squares: Tensor, second: Tensor, energy: float) -> ReaderState:
    own = reader.channels.flatten()
    inverse, squares, second = (square[own][:, own] for square in (inverse, squares, second))
    return ReaderState(inverse, squares, second, reader.channels.shape[1], energy)


def _whole(moments: Moments) -> Tensor:
    """Return the second moments as one matrix; the parts of a grouped convolution cannot stand in for each other."""
    return torch.block_diag(*(part / max(1, moments.rows) for part in moments.own))


def eliminate(states: list[ReaderState], size: int, rule: str = "damage") -> Tensor:
    """Delete the `size` units of `states` one by one, the cheapest first; returns the price of each (see above)."""
    left = torch.arange(size)  # the units whose columns the states still hold
    alive = torch.ones(size, dtype=torch.bool)
    scores, highest = torch.zeros(size, dtype=torch.float64), 0.0
    for turn in range(size):
        damage = torch.stack([state.damage(rule) for state in states]).sum(dim=0)
        chosen = int(torch.where(alive, damage, torch.inf).argmin())
        highest = max(highest, float(damage[chosen]))
        # A hair more for each later turn: the order must survive where the prices are equal.
        scores[left[chosen]] = highest * (1 + 1e-5 * turn / size)
        alive[chosen] = False
        for state in states:
            state.remove(chosen)
        if int(alive.sum()) <= 0.8 * len(left):  # what is gone costs as much as what is there
            stays = alive.nonzero().flatten()
            for state in states:
                state.compact(stays)
            left, alive = left[stays], torch.ones(len(stays), dtype=torch.bool)
    return scores
