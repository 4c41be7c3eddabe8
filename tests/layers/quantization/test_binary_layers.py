"""Binary layers: signs, surrogates and gradients by formula, exact products, thresholds, one bit a weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.common import drawn
from torch import nn
from torch.nn import functional as F

from convette.errors import UsageError
from convette.layers.quantization import (
    BinaryConv2d,
    BinaryLinear,
    PackedBinaryConv2d,
    SignActivation,
    pack_binary,
    sign_thresholds,
)
from convette.layers.quantization.binary_networks import sign
from convette.surgery import trace


def test_zero_is_positive_everywhere():
    x = torch.tensor([-1e-9, -0.0, 0.0, 3.0])
    assert sign(x).tolist() == [-1, 1, 1, 1] == SignActivation()(x).tolist()
    layer = BinaryConv2d(2, 3, 1)
    with torch.no_grad():
        layer.weight.zero_()
    assert (layer.signs() == 1).all()


@pytest.mark.parametrize("surrogate", ["approx", "ste"])
def test_the_surrogates_are_their_formulas(surrogate):
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64).requires_grad_()
    SignActivation(surrogate)(x).sum().backward()
    inside = x.detach().abs() < 1
    expected = (2 - 2 * x.detach().abs()) if surrogate == "approx" else torch.ones_like(x)
    assert torch.allclose(x.grad, torch.where(inside, expected, 0.0))
    assert torch.trapezoid(x.grad, x.detach()).item() == pytest.approx(2, abs=2e-3)
    with pytest.raises(UsageError, match="Did you mean 'approx'"):
        SignActivation("aprox")


def test_gradients_of_the_weights_are_their_formulas():
    grad = drawn(3, 2, 2, 2, seed=1).double()
    for mode in ("clip", "magnitude", "xnor"):
        layer = BinaryConv2d(2, 3, 2, weight_gradient=mode).double()
        with torch.no_grad():
            layer.weight.copy_(drawn(3, 2, 2, 2).double() * 1.5)
        weight = layer.binary_weight()
        values = [filter.unique().tolist() for filter in weight.detach()]
        alpha = layer.weight.detach().abs().mean((1, 2, 3))
        assert values == [pytest.approx([-a, a]) for a in alpha.tolist()]
        weight.backward(grad)
        inside = layer.weight.detach().abs() <= 1
        assert not inside.all()
        if mode == "clip":
            expected = grad * inside
        elif mode == "magnitude":
            expected = grad * alpha[:, None, None, None] * inside
        else:
            signs = sign(layer.weight.detach())
            mean = (grad * signs).sum((1, 2, 3), keepdim=True) / 8
            expected = (grad * alpha[:, None, None, None] * inside + signs * mean) * 8 * 0.5
        assert torch.allclose(layer.weight.grad, expected)


def test_a_learned_scale_is_a_parameter_that_both_forms_use():
    layer = BinaryConv2d(2, 3, 2, scale="learned").double()
    assert layer.learned_alpha is not None
    assert torch.allclose(layer.learned_alpha, layer.weight.abs().mean((1, 2, 3)))
    with torch.no_grad():
        layer.learned_alpha.copy_(torch.tensor([0.5, 2.0, 3.0]))
    images = drawn(2, 2, 5, 5).double()
    trained = layer.train()(images)
    trained.sum().backward()
    products = F.conv2d(sign(images), layer.signs())
    assert torch.allclose(layer.learned_alpha.grad, products.sum((0, 2, 3)))
    assert torch.allclose(trained, layer.eval()(images))
    packed = pack_binary(nn.Sequential(layer.float()))
    assert torch.equal(packed(images.float()), layer(images.float()))
    with pytest.raises(UsageError, match="Did you mean 'mean'"):
        BinaryConv2d(2, 3, 2, scale="meen")


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_alpha_is_the_best_scale(seed):
    layer = BinaryLinear(20, 4)
    with torch.no_grad():
        layer.weight.copy_(drawn(4, 20, seed=seed))
    best = (layer.weight - layer.alpha()[:, None] * layer.signs()).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert best <= (layer.weight - factor * layer.alpha()[:, None] * layer.signs()).square().sum()


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2), (5, 1)])
def test_both_modes_and_the_packed_form_convolve_signs(kernel, stride, value):
    layer = BinaryConv2d(6, 5, kernel, stride, kernel // 2, bias=True, padding_value=value, threshold=0.1)
    x = drawn(2, 6, 7, 8)
    wide = F.pad(sign(x - 0.1), (kernel // 2,) * 4, value=float(value))
    alpha = layer.alpha()[:, None, None, None]
    expected = F.conv2d(wide, alpha * layer.signs(), layer.bias, stride)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    plain = layer.eval()(x)
    assert torch.allclose(plain, expected, atol=1e-5)
    packed = PackedBinaryConv2d(
        6, 5, (kernel, kernel), (stride, stride), (kernel // 2,) * 2, bias=True, padding_value=value, thresholds=True
    )
    packed.take_over(layer)
    assert torch.equal(packed(x), plain)
    assert packed.bits.numel() == -(-5 * 6 * kernel**2 // 8) and packed.stored_weights == 30 * kernel**2


def test_a_convolution_becomes_binary_and_keeps_its_weights():
    from convette import surgery

    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    weight = net[1].weight.detach().clone()
    surgery.convert(net, {nn.Conv2d: BinaryConv2d}, drawn(1, 4, 6, 6))
    assert isinstance(net[1], BinaryConv2d) and torch.equal(net[1].weight, weight)
    for wrong in ({"padding_value": 2}, {"scale": "max"}, {"weight_gradient": "cut"}):
        with pytest.raises(UsageError):
            BinaryConv2d(1, 1, 1, **wrong)


def test_a_norm_and_a_sign_are_a_comparison_of_integers():
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(24).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
        norm.weight[:2] = 0
        norm.bias.copy_(torch.randn(24, generator=generator))
        norm.running_mean.copy_(5 * torch.randn(24, generator=generator))
        norm.running_var.copy_(torch.rand(24, generator=generator) * 50 + 0.1)
    norm = norm.double()
    alpha, bias = torch.rand(24, generator=generator).double() + 0.01, torch.randn(24, generator=generator).double()
    theta, direction, constant = sign_thresholds(norm, alpha, bias)
    integers = torch.arange(-300, 301).double().repeat(24, 1)
    expected = sign(norm((alpha[:, None] * integers + bias[:, None])[None, :, :, None])[0, :, :, 0])
    up, down = integers >= theta[:, None], integers <= theta[:, None]
    found = torch.where(direction[:, None] > 0, up, down).double() * 2 - 1
    found = torch.where(direction[:, None] == 0, constant[:, None], found)
    assert torch.equal(found, expected)
    assert np.isfinite(theta.numpy()).all() and (direction < 0).any() and (direction == 0).sum() == 2
    with pytest.raises(UsageError, match="above zero"):
        sign_thresholds(norm, torch.zeros(24))


@pytest.mark.parametrize("scale", ["mean", "one"])
def test_every_channel_can_be_removed(scale):
    layers = [
        nn.Conv2d(3, 8, 3),
        BinaryConv2d(8, 12, 3, scale=scale),
        nn.BatchNorm2d(12),
        BinaryConv2d(12, 4, 1, scale=scale),
        nn.Flatten(),
        BinaryLinear(4 * 9, 6, scale=scale),
        nn.Linear(6, 2),
    ]
    graph = trace(nn.Sequential(*layers).eval(), drawn(1, 3, 7, 7))
    assert [(group.name, group.size) for group in graph] == [("0", 8), ("1", 12), ("3", 4), ("5", 6)]
