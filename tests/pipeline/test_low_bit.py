"""A run whose network is written in few bits: the size budget is met by bits, the packed network goes on from there."""

import torch

from convette import load
from convette.layers.quantization import PackedConv2d
from convette.pipeline.fit import run_recipe
from convette.pipeline.recipe import build_recipe
from convette.pipeline.results import read_result

STAGES = ("data", "model", "train", "compress", "quantize", "export", "verify")


def test_a_size_budget_is_met_by_cuts_and_bits_together(tmp_path):
    recipe = build_recipe(
        {
            "model": {"name": "resnet8"},
            "train": {"epochs": 1, "batch_size": 256, "precision": "fp32", "augmentation": []},
            "prune": {"epochs": 1, "steps": 1, "distil": False},
            "quantize": {"method": "low_bit", "block_steps": 2, "joint_steps": 2, "calibration_images": 40},
            "export": {"formats": ["onnx"]},
            "run": {"engines": ["onnxruntime:cpu"]},
        },
        {"budget.limits": "size<=30KB"},
    )
    result = run_recipe(recipe, STAGES, out=tmp_path / "run")
    assert result.met and result["size"] <= 30_000
    quantized = read_result(tmp_path / "run", "quantize")
    assert quantized.kept == "low_bit" and "bits" in quantized.reason
    assert read_result(tmp_path / "run", "compress").path[-1].size > 30_000  # the channels alone did not meet it
    model = load(result.files["model"])
    assert any(isinstance(layer, PackedConv2d) for layer in model.modules())
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    (check,) = read_result(tmp_path / "run", "verify").files
    assert check.engine == "onnxruntime:cpu:int8" and check.passed
