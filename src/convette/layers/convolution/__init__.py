"""Convolutions of other kinds: factorised and quadratic ones."""

from convette.layers.convolution._decomposition import compose, decompose
from convette.layers.convolution._factorizing import Compression, compress_a_priori, factorize, materialize
from convette.layers.convolution._quadratic_networks import QuadraticResNet, quadratic_alexnet
from convette.layers.convolution.quadratic_convolution import (
    QuadraticConv2d,
    WideFormWarning,
    absorb_norms,
    to_quadratic,
)
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
    "QuadraticConv2d",
    "QuadraticResNet",
    "WideFormWarning",
    "absorb_norms",
    "break_even",
    "compose",
    "compress_a_priori",
    "decompose",
    "factor_parameters",
    "factorize",
    "materialize",
    "quadratic_alexnet",
    "rank_for",
    "to_quadratic",
]
