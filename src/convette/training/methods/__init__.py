"""Methods of published systems: a small file each, which binds what a layer or loss can do to the trainer's events.

`find_method` finds one by name; `methods_of` those that the layers of a network are trained with.
"""

from convette.training.methods._finding import check_options, find_method, make_method, methods_of, with_own
from convette.training.methods.binary_networks import LatentWeights
from convette.training.methods.consistent_normalization import ConsistentTraining
from convette.training.methods.fast_sparse_convnets import SparseTraining
from convette.training.methods.mixstyle import MixStyleDomains, SemiMixStyleTraining
from convette.training.methods.norm_loss import NormLossTraining
from convette.training.methods.quantization_aware import QuantizationAware
from convette.training.methods.skewness_batch_norm import AnnealSkewness
from convette.training.methods.sparse_switchable_normalization import SparseSwitch

__all__ = [
    "AnnealSkewness",
    "ConsistentTraining",
    "LatentWeights",
    "MixStyleDomains",
    "NormLossTraining",
    "QuantizationAware",
    "SemiMixStyleTraining",
    "SparseSwitch",
    "SparseTraining",
    "check_options",
    "find_method",
    "make_method",
    "methods_of",
    "with_own",
]
