"""Layers that drop into any network in the place of PyTorch's own, by kind; and what they become at inference.

`folded_form` asks one layer, `fold_layers` a whole network; `find_layer` finds one by name.
"""

from convette.layers._finding import find_layer, is_layer, is_placing, public_layers
from convette.layers._folding import Foldable, FoldedLayers, Stays, fold_layers, folded_form
from convette.layers._modules import TakesOver, replace_modules

__all__ = [
    "Foldable",
    "FoldedLayers",
    "Stays",
    "TakesOver",
    "find_layer",
    "fold_layers",
    "folded_form",
    "is_layer",
    "is_placing",
    "public_layers",
    "replace_modules",
]
