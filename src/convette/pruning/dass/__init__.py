"""DASS: architecture search for sparse networks: operations judged as sparse as they will be (arXiv 2207.06968).

DASS: Differentiable Architecture Search for Sparse Neural Networks, S. H. Mousavi and others, 2023. `SparseConv2d` and
`SparseLinear` hold a score for every weight and keep exactly a share of them; `CellNet` is a cell-based supernet of
them, and `search` finds the cell whose sparse network validates best.
"""

from convette.pruning.dass.cells import Cell, CellNet, Genotype, candidate_operations
from convette.pruning.dass.layers import SparseConv2d, SparseLinear, masks_fixed, masks_off, sparse_modules, to_sparse
from convette.pruning.dass.search import DASSResult, DASSSettings, search

__all__ = [
    "Cell",
    "CellNet",
    "DASSResult",
    "DASSSettings",
    "Genotype",
    "SparseConv2d",
    "SparseLinear",
    "candidate_operations",
    "masks_fixed",
    "masks_off",
    "search",
    "sparse_modules",
    "to_sparse",
]
