"""Networks published with a layer: by name, saved and loaded."""

import pytest
import torch

from convette.models import create_model, load, save


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("atac_resnet8", 89_578),
        ("atac_resnet20", 306_858),
        ("wide_resnet28_10", 36_479_194),
        ("quadratic_resnet20", 128_030_698),
        ("quadratic_alexnet", 31_453_354),
    ],
)
def test_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, num_classes=10).parameters()) == count


@pytest.mark.parametrize("name", ["atac_resnet8", "autonl_s", "quadratic_resnet20_rank2", "wide_resnet16_4"])
def test_saved_and_loaded(name, tmp_path):
    model = create_model(name, num_classes=3, in_channels=1, seed=0).eval()
    x = torch.randn(1, 1, 32, 32)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))
