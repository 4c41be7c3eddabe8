"""Quantised layers: trainable ones (straight-through estimators), and ones whose weights are stored packed."""

from convette.layers.quantization.binary_networks import (
    BinaryConv2d,
    BinaryLinear,
    PackedBinaryConv2d,
    SignActivation,
    pack_binary,
    sign_thresholds,
)
from convette.layers.quantization.fake_quantize import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    fake_quantize,
)
from convette.layers.quantization.observers import group_scales, observed_range, optimal_partition
from convette.layers.quantization.packed import PackedConv2d, PackedLinear, pack, packed_bytes, unpack

__all__ = [
    "ActivationQuantizer",
    "BinaryConv2d",
    "BinaryLinear",
    "PackedBinaryConv2d",
    "PackedConv2d",
    "PackedLinear",
    "QuantConv2d",
    "QuantLinear",
    "SignActivation",
    "fake_quantize",
    "group_scales",
    "observed_range",
    "optimal_partition",
    "pack",
    "pack_binary",
    "packed_bytes",
    "sign_thresholds",
    "unpack",
]
