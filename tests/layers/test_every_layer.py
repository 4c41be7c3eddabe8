"""What holds for every layer beside the normalisers: odd input, state, folds, export, compilation, surgery."""

import pytest
import torch
from tests.layers import common
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays, folded_form
from convette.layers.activation import ATAC, LateralInhibition2d, RingInhibitedConv2d
from convette.layers.attention import LightNonLocal2d, SoAG
from convette.layers.convolution import QuadraticConv2d
from convette.layers.regularization import MaxDropout

C = 6
LAYERS = {
    "inhibition": lambda: LateralInhibition2d(C),
    "inhibition_linear": lambda: LateralInhibition2d(C, 2, "linear", contrast=True),
    "inhibition_none": lambda: LateralInhibition2d(C, init=0.0),
    "ring": lambda: RingInhibitedConv2d(C, C, 3, padding=1),
    "maxdropout": lambda: MaxDropout(),
    "maxdropout_channel": lambda: MaxDropout(0.5, "channel"),
    "atac": lambda: ATAC(C),
    "atac_global": lambda: ATAC(C, use_global=True),
    "soag": lambda: SoAG(C, 8),
    "soag_pure": lambda: SoAG(C, 8, "pure", center=True),
    "nonlocal": lambda: LightNonLocal2d(C, 0.5, zero_init=False),
    "nonlocal_strided": lambda: LightNonLocal2d(C, 0.5, 2, order="moments", zero_init=False),
    "quadratic": lambda: QuadraticConv2d(C, C, 3, padding=1),
    "quadratic_low_rank": lambda: QuadraticConv2d(C, C, 3, padding=1, rank=2),
}
# Norms inside: one value a channel is refused in training.
BATCH = ("atac", "atac_global", "soag", "nonlocal", "nonlocal_strided")
FOLD = {"inhibition_linear": nn.Conv2d, "inhibition_none": nn.Identity}
FOLD |= {"maxdropout": nn.Identity, "maxdropout_channel": nn.Identity}
# Computed in a precision of its own, whatever autocast says; the others are as exact as convolutions are.
ROUGH = ("quadratic", "quadratic_low_rank", "ring", "soag", "nonlocal", "nonlocal_strided")


def example(count=8):
    return torch.randn(count, C, 5, 4, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def learned(name):
    return common.learned(LAYERS[name], example(), move=name != "inhibition_none")


@pytest.mark.parametrize("name", LAYERS)
def test_state_copies_and_batches(name):
    layer = learned(name).eval()
    common.check_state_and_copies(LAYERS[name], layer, example())
    common.check_examples_are_alone(layer, example())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_the_same(name, training):
    common.check_channels_last(learned(name).train(training), example())


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    layer, exact, x = learned(name).eval(), learned(name).eval(), example()
    expected = exact(x)
    for found in (layer.bfloat16()(x.bfloat16()), _autocast(exact, x.bfloat16())):
        assert bool(torch.isfinite(found.float()).all())
        close = 0.1 if name in ROUGH else 0.03
        error = (found.float() - expected).detach().abs().max()
        assert float(error) < close * max(1.0, float(expected.detach().abs().max()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def _autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_input_gives_finite_numbers_and_gradients(name, value):
    common.check_constant_input(LAYERS[name]().train(), torch.full((4, C, 5, 4), value))


@pytest.mark.parametrize("name", LAYERS)
def test_not_a_number_comes_out(name):
    x = example()
    x[0, 0, 0, 0] = float("nan")
    for training in (True, False):
        y = learned(name).train(training)(x)
        assert bool(torch.isnan(y[0]).any())
        if not training:
            assert not bool(torch.isnan(y[1:]).any())


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    common.check_empty_batch(learned(name), example())


@pytest.mark.parametrize("name", LAYERS)
def test_batch_of_one_and_maps_of_one_pixel(name):
    layer, x = learned(name), example(1)
    if name == "atac_global":
        with pytest.raises(UsageError, match="at least 2"):
            layer(x)
    else:
        assert bool(torch.isfinite(layer(x)).all())
    pixel = x[..., :1, :1]
    if name in BATCH:
        common.check_one_value_is_refused(layer, pixel)
    assert bool(torch.isfinite(layer.eval()(pixel)).all()) and layer(pixel).shape == pixel.shape


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("maxdropout")])
def test_another_width_is_refused(name):
    with pytest.raises((UsageError, RuntimeError), match=r"expected|Given"):
        LAYERS[name]()(torch.randn(2, 2 * C, 5, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_folds_are_exact_or_say_why_not(name):
    layer = learned(name).eval()
    result = common.check_folded(layer, example())
    if name in FOLD:
        assert type(result.model[0]) is FOLD[name]
    else:
        assert len(result.kept["0"]) > 20
        with pytest.raises(Stays):
            folded_form(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_torch_export(name):
    common.check_torch_export(learned(name).eval(), example())


@pytest.mark.parametrize("name", LAYERS)
def test_surgery_folds_around_it_and_shrinks_it_exactly(name):
    model = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), learned(name), nn.ReLU(), nn.Conv2d(C, 3, 3), nn.Flatten()
    )
    model.append(nn.Linear(18, 2)).eval()
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(6))
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    graph = common.check_surgery(model, x, first=1)
    assert "0" in {group.name for group in graph.groups} and not graph.frozen
    assert model[0].out_channels == 3
    model.train()(torch.randn(4, 3, 5, 4)).sum().backward()


def test_exported_to_onnx_they_agree(tmp_path):
    model, x = nn.Sequential(*(learned(name) for name in LAYERS)).eval(), example(2)
    common.check_onnx(model, x, tmp_path, atol=1e-4 * float(model(x).detach().abs().max()), rtol=1e-4)


def compiled():
    return {name: (make(), example()) for name, make in LAYERS.items()}


def test_training_compiles_without_a_graph_break():
    common.check_compiles(__name__)
