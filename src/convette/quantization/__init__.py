"""Quantisation after training: int8 files for OpenVINO and ONNX Runtime, kept only where they pay."""

from convette.layers.quantization.binary_networks import pack_binary
from convette.layers.quantization.edits import pack_layers, quantize_layers
from convette.quantization._int8 import quantize_onnx, quantize_openvino
from convette.quantization._quantize import Candidate, QuantizeResult, choose, quantize
from convette.quantization._settings import QuantizeSettings
from convette.quantization.binary_networks import BinaryCost, binary_cost
from convette.quantization.engines import EngineSurvey, all_engines, random_images, survey_engines
from convette.quantization.low_bit_limited_data import LowBitResult, LowBitSettings, low_bit
from convette.training.methods.quantization_aware import QuantizationAware

__all__ = [
    "BinaryCost",
    "Candidate",
    "EngineSurvey",
    "LowBitResult",
    "LowBitSettings",
    "QuantizationAware",
    "QuantizeResult",
    "QuantizeSettings",
    "all_engines",
    "binary_cost",
    "choose",
    "low_bit",
    "pack_binary",
    "pack_layers",
    "quantize",
    "quantize_layers",
    "quantize_onnx",
    "quantize_openvino",
    "random_images",
    "survey_engines",
]
