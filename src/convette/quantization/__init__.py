"""Quantisation after training: int8 files for OpenVINO and ONNX Runtime, kept only where they pay."""

from convette.quantization._int8 import quantize_onnx, quantize_openvino
from convette.quantization._quantize import Candidate, QuantizeResult, choose, quantize
from convette.quantization._settings import QuantizeSettings

__all__ = [
    "Candidate",
    "QuantizeResult",
    "QuantizeSettings",
    "choose",
    "quantize",
    "quantize_onnx",
    "quantize_openvino",
]
