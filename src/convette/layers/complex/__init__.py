"""Complex-valued layers, on pairs of real channels."""

from convette.layers.complex._networks import draw_weights, match_params, study_arms, to_complex
from convette.layers.complex._parts import (
    Cardioid,
    ComplexBatchNorm2d,
    ComplexDropout,
    ComplexMaxPool2d,
    ModReLU,
    OnParts,
    ZReLU,
    inverse_root,
)
from convette.layers.complex.complex_convolution import (
    ComplexConv2d,
    ComplexConvTranspose2d,
    ComplexHead,
    Complexify,
    ComplexLinear,
    as_complex,
    as_pairs,
    block_kernel,
    complexified,
    joined,
    magnitude,
    parts,
)

__all__ = [
    "Cardioid",
    "ComplexBatchNorm2d",
    "ComplexConv2d",
    "ComplexConvTranspose2d",
    "ComplexDropout",
    "ComplexHead",
    "ComplexLinear",
    "ComplexMaxPool2d",
    "Complexify",
    "ModReLU",
    "OnParts",
    "ZReLU",
    "as_complex",
    "as_pairs",
    "block_kernel",
    "complexified",
    "draw_weights",
    "inverse_root",
    "joined",
    "magnitude",
    "match_params",
    "parts",
    "study_arms",
    "to_complex",
]
