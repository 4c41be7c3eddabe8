"""What holds for factorised, complex, hyperbolic, routing and higher-order layers: odd input, state, export, surgery."""

import pytest
import torch
from tests.layers import common
from torch import nn

from convette.layers import Stays, folded_form
from convette.layers.attention import HigherOrderBlock
from convette.layers.complex import (
    Cardioid,
    ComplexBatchNorm2d,
    ComplexConv2d,
    ComplexConvTranspose2d,
    ComplexDropout,
    ComplexMaxPool2d,
    ModReLU,
    ZReLU,
    as_complex,
)
from convette.layers.convolution import FactorizedConv2d
from convette.layers.hyperbolic import PoincareBatchNorm2d, PoincareBlock, PoincareConv2d
from convette.layers.routing import CrossConnection, PathMean, Paths, StaticRouting

C = 8
LAYERS = {
    "factorized": lambda: FactorizedConv2d(C, C, 3, padding=1),
    "factorized_svd": lambda: FactorizedConv2d(C, C, 3, padding=1, form="svd"),
    "factorized_cp": lambda: FactorizedConv2d(C, C, 3, padding=1, form="cp", rank=4),
    "higher_order": lambda: HigherOrderBlock(C),
    "higher_order_softmax": lambda: HigherOrderBlock(C, norm="softmax"),
    "higher_order_l2": lambda: HigherOrderBlock(C, norm="l2", groups=1),
    "cross": lambda: CrossConnection(C // 2, 2),
    "cross_in": lambda: CrossConnection(C // 4, 4, normalize="in"),
    "static": lambda: StaticRouting(torch.tensor([[0.9, 0.1], [0.3, 0.7]])),
    "paths": lambda: nn.Sequential(
        Paths([nn.Conv2d(C // 2, C, 3, padding=1), nn.Conv2d(C // 2, C, 3, padding=1)]), PathMean(2)
    ),
    "complex": lambda: ComplexConv2d(C // 2, C // 2, 3, padding=1),
    "complex_three": lambda: ComplexConv2d(C // 2, C // 2, 3, padding=1, method="karatsuba"),
    "complex_up": lambda: ComplexConvTranspose2d(C // 2, C // 2, 3, padding=1),
    "complex_norm": lambda: ComplexBatchNorm2d(C // 2),
    "complex_norm_naive": lambda: ComplexBatchNorm2d(C // 2, mode="naive"),
    "complex_norm_magnitude": lambda: ComplexBatchNorm2d(C // 2, mode="magnitude"),
    "modrelu": lambda: ModReLU(C // 2),
    "zrelu": ZReLU,
    "cardioid": Cardioid,
    "complex_pool": lambda: ComplexMaxPool2d(3, 1, 1),
    "complex_dropout": ComplexDropout,
    "poincare": lambda: PoincareConv2d(C, C, 3, padding=1),
    "poincare_norm": lambda: PoincareBatchNorm2d(C),
    "poincare_block": lambda: PoincareBlock(C, C),
}
# Norms inside: one value a channel is refused in training.
BATCH = tuple(name for name in LAYERS if name.startswith(("higher", "complex_norm", "poincare_norm", "poincare_block")))
PLAIN = ("factorized", "factorized_svd", "factorized_cp", "complex", "complex_three", "complex_up", "complex_norm")
PLAIN += ("complex_norm_naive", "complex_norm_magnitude")
STAY = ("higher_order", "cross", "static", "poincare", "poincare_norm")
# What bfloat16 leaves of three convolutions in a row, or of whitening.
ROUGH = 0.1


def example(count=8):
    return torch.randn(count, C, 5, 4, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def learned(name):
    return common.learned(LAYERS[name], example())


@pytest.mark.parametrize("name", LAYERS)
def test_state_copies_and_batches(name):
    layer = learned(name).eval()
    common.check_state_and_copies(LAYERS[name], layer, example())
    common.check_examples_are_alone(layer, example())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_the_same(name, training):
    layer = learned(name).train(training and name != "complex_dropout")
    common.check_channels_last(layer, example(), tolerance=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    layer, exact, x = learned(name).eval(), learned(name).eval(), example()
    expected = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact(x.bfloat16())
    whole = layer.bfloat16()(x.bfloat16())
    assert whole.dtype == torch.bfloat16
    for found in (whole, mixed):
        assert bool(torch.isfinite(found.float()).all())
        if name == "complex_pool":  # rounding decides between numbers of nearly one size
            found, expected = (as_complex(item.float()).abs() for item in (found, exact(x)))
        assert float((found.float() - expected).abs().max()) < ROUGH * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_input_gives_finite_numbers_and_gradients(name, value):
    common.check_constant_input(LAYERS[name]().train(), torch.full((4, C, 5, 4), value))


@pytest.mark.parametrize("name", LAYERS)
def test_not_a_number_comes_out_and_spoils_nothing(name):
    x = example()
    x[0, 0, 0, 0] = float("nan")
    layer = learned(name)
    if name not in ("complex_dropout", "zrelu", "complex_pool"):
        assert bool(torch.isnan(layer.train()(x)[0]).any())
        if "higher" not in name:  # PyTorch's own batch norms keep what they have seen
            assert all(bool(torch.isfinite(buffer).all()) for buffer in layer.buffers())
    y = learned(name).eval()(x)
    assert bool(torch.isnan(y[0]).any()) and not bool(torch.isnan(y[1:]).any())


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    common.check_empty_batch(learned(name), example())


@pytest.mark.parametrize("name", LAYERS)
def test_batch_of_one_and_maps_of_one_pixel(name):
    layer, x = learned(name), example(1)
    assert bool(torch.isfinite(layer(x)).all())
    pixel = x[..., :1, :1]
    if name in BATCH:
        common.check_one_value_is_refused(layer, pixel)
    assert bool(torch.isfinite(layer.eval()(pixel)).all()) and layer(pixel).shape == pixel.shape


@pytest.mark.parametrize("name", LAYERS)
def test_folds_are_exact_or_say_why_not(name):
    layer = learned(name).eval()
    result = common.check_folded(layer, example(), tolerance=1e-4)
    if name in PLAIN:
        assert not result.kept and all(type(m).__module__.startswith("torch") for m in result.model.modules())
    elif name in STAY:
        with pytest.raises(Stays) as reason:
            folded_form(layer)
        assert len(str(reason.value)) > 40


@pytest.mark.parametrize("name", LAYERS)
def test_torch_export(name):
    common.check_torch_export(learned(name).eval(), example(), tolerance=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_surgery_folds_around_it_and_shrinks_it_exactly(name):
    graph = common.check_surgery(*common.network_around(learned(name), C), tolerance=1e-4)
    assert not graph.frozen


# One of each make: exporting and compiling are slow.
EXPORTED = ["factorized", "higher_order_l2", "cross", "complex", "complex_norm", "cardioid", "complex_pool"]
EXPORTED += ["poincare", "poincare_norm"]


def test_exported_to_onnx_they_agree(tmp_path):
    """One file with one layer of each make."""
    torch.manual_seed(7)
    layers = [learned(name) for name in EXPORTED]
    # A norm between, so that numbers stay of one size.
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GroupNorm(2, C))]).eval()
    common.check_onnx(model, example(2), tmp_path, atol=1e-3, rtol=1e-3)


def compiled():
    return {name: (LAYERS[name](), example()) for name in ("cross", "complex_norm", "poincare_norm")}


def test_training_compiles_without_a_graph_break():
    common.check_compiles(__name__)
