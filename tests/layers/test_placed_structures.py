"""Systems that restructure a whole network, from a recipe's words: logged, written, read, folded, of any library."""

import pytest
import torch

from convette.models import create_model, load, save
from convette.surgery import Conversion, convert_by, fold, what_stays

SYSTEMS = {
    "compress_a_priori": {"rank": 2, "deploy": "dense"},
    "insert_higher_order": {"stages": [2, 3]},
    "multipath": {"paths": 2},
    "to_complex": {"activation": "modrelu"},
    "to_poincare": {"c": 0.1},
}
PLAIN = ("compress_a_priori", "to_complex")


def converted(network, name):
    model = create_model(network, num_classes=3, seed=0)
    convert_by(model, Conversion(name, options=SYSTEMS[name]), example=torch.randn(2, 3, 32, 32))
    return model


@pytest.mark.parametrize("name", SYSTEMS)
def test_converted_trained_folded_written_and_read(name, tmp_path):
    options = dict(SYSTEMS[name])
    if name == "to_complex":
        options.pop("activation")  # ResNet-20 calls its ReLUs as functions
    model = create_model("resnet20", num_classes=3, seed=0)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    convert_by(model, Conversion(name, options=options), example=images)
    model(images).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    expected = model.eval()(images)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")(images), expected)
    folded = fold(model, images)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(folded(images) / scale, expected / scale, atol=1e-5, rtol=1e-5)
    kept = what_stays(folded)
    assert all(len(reason) > 20 for reason in kept.values())
    ours = [type(m).__name__ for m in folded.modules() if type(m).__module__.startswith("convette.layers")]
    assert set(ours) <= {"Complexify", "ComplexHead", "OnParts"} if name in PLAIN else ours
    save(folded, tmp_path / "folded.safetensors")
    torch.testing.assert_close(load(tmp_path / "folded.safetensors")(images), folded(images))


@pytest.mark.parametrize(
    ("network", "name"),
    [*[("timm:resnet10t", name) for name in SYSTEMS], ("torchvision:resnet18", "multipath")],
)
def test_networks_of_other_libraries(name, network):
    model = converted(network, name).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
