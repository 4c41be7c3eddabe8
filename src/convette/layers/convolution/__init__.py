"""Convolutions of other kinds: factorised ones."""

from convette.layers.convolution._decomposition import compose, decompose
from convette.layers.convolution._factorizing import Compression, compress_a_priori, factorize, materialize
from convette.layers.convolution.tensor_compressed_convolution import (
    FactorizedConv2d,
    FactorizedConv3d,
    break_even,
    factor_parameters,
    rank_for,
)

__all__ = [
    "Compression",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "break_even",
    "compose",
    "compress_a_priori",
    "decompose",
    "factor_parameters",
    "factorize",
    "materialize",
    "rank_for",
]
