"""Quantisation after training: int8 files for OpenVINO and ONNX Runtime, kept only where they pay."""

from convette.quantization._int8 import quantize_onnx, quantize_openvino
from convette.quantization._quantize import Candidate, QuantizeResult, choose, quantize
from convette.quantization._settings import QuantizeSettings
from convette.quantization.engines import EngineSurvey, all_engines, random_images, survey_engines

__all__ = [
    "Candidate",
    "EngineSurvey",
    "QuantizeResult",
    "QuantizeSettings",
    "all_engines",
    "choose",
    "quantize",
    "quantize_onnx",
    "quantize_openvino",
    "random_images",
    "survey_engines",
]
