"""The space that DASS searches: networks of cells whose convolutions, depthwise ones aside, are sparse."""

from functools import partial

from torch import nn

from convette.models.cell_network import OPERATIONS, Cell, CellNetwork, Genotype, candidate_operations
from convette.pruning.dass.layers import SparseConv2d, SparseLinear

__all__ = ["OPERATIONS", "Cell", "CellNet", "Genotype", "candidate_operations"]


class CellNet(CellNetwork):
    """A `CellNetwork` of sparse layers: stem, depthwise convolutions and batch norms are dense, the classifier a
    `SparseLinear`. A supernet where `genotype` is None."""

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        sparsity: float = 0.9,
        genotype: Genotype | None = None,
    ) -> None:
        def linear(ins: int, outs: int) -> SparseLinear:
            return SparseLinear(ins, outs, sparsity=min(sparsity, 1 - 1 / max(2, ins)))

        conv = partial(SparseConv2d, sparsity=sparsity)
        super().__init__(
            channels,
            cells,
            in_channels=in_channels,
            num_classes=num_classes,
            genotype=genotype,
            conv=conv,
            linear=linear,
        )

    def score_parameters(self) -> list[nn.Parameter]:
        """Return the scores that say what is masked."""
        return [parameter for name, parameter in self.named_parameters() if name.endswith(".scores")]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return all other parameters."""
        others = {id(parameter) for parameter in [*self.architecture(), *self.score_parameters()]}
        return [parameter for parameter in self.parameters() if id(parameter) not in others]
