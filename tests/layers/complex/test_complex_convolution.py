"""CV-CNN: PyTorch's complex convolution, algebra, phase, whitening, counts, starts, pooling, whole networks."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers import fold_layers
from convette.layers.complex import (
    Cardioid,
    ComplexBatchNorm2d,
    ComplexConv2d,
    ComplexConvTranspose2d,
    ComplexDropout,
    ComplexHead,
    ComplexLinear,
    ComplexMaxPool2d,
    ModReLU,
    OnParts,
    ZReLU,
    as_complex,
    as_pairs,
    complexified,
    inverse_root,
    magnitude,
    match_params,
    parts,
    study_arms,
    to_complex,
)
from convette.models import create_model

Z = torch.complex128


def drawn(*shape):
    return torch.randn(*shape, dtype=Z)


def double(layer):
    layer = layer.double()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1:
            nn.init.normal_(tensor, std=0.5)
    return layer


@pytest.mark.parametrize("method", ["block", "karatsuba"])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"padding": 2, "dilation": 2}], ids=str
)
def test_the_convolution_is_pytorchs_complex_one(method, options):
    torch.manual_seed(0)
    layer, z = double(ComplexConv2d(4, 6, 3, method=method, **options)), drawn(2, 4, 7, 6)
    weight = torch.complex(layer.real, layer.imaginary)
    bias = torch.view_as_complex(layer.bias.view(-1, 2))
    expected = functional.conv2d(z, weight, bias, **options)
    torch.testing.assert_close(layer(z), expected)
    torch.testing.assert_close(as_complex(layer(as_pairs(z))), expected)
    torch.testing.assert_close(layer.folded()(as_pairs(z)), as_pairs(expected))


def test_transposed_and_linear_ones_too():
    torch.manual_seed(1)
    up, z = double(ComplexConvTranspose2d(4, 3, 3, 2, 1, 1)), drawn(2, 4, 5, 6)
    weight, bias = torch.complex(up.real, up.imaginary), torch.view_as_complex(up.bias.view(-1, 2))
    expected = functional.conv_transpose2d(z, weight, bias, 2, 1, 1)
    torch.testing.assert_close(up(z), expected)
    torch.testing.assert_close(up.folded()(as_pairs(z)), as_pairs(expected))
    linear, v = double(ComplexLinear(4, 3)), drawn(5, 4)
    expected = v @ torch.complex(linear.real, linear.imaginary).T + torch.view_as_complex(linear.bias.view(-1, 2))
    torch.testing.assert_close(linear(v), expected)
    torch.testing.assert_close(linear.folded()(as_pairs(v)), as_pairs(expected))


def test_real_weights_on_real_maps_are_the_real_convolution():
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer, x = ComplexConv2d(3, 4, 3, padding=1, complexify="zero"), torch.randn(2, 3, 5, 5)
    layer.take_over(conv)
    real, imaginary = parts(layer(x))
    torch.testing.assert_close(real, conv(x), atol=1e-6, rtol=1e-5)
    assert float(imaginary.abs().max()) == 0


def test_the_bias_is_added_once():
    layer = ComplexConv2d(1, 1, 1)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.3, -0.7]))
    assert layer(torch.zeros(1, 2, 1, 1)).flatten().tolist() == pytest.approx([0.3, -0.7])


def test_phase_passes_what_it_should_and_nothing_else():
    torch.manual_seed(3)
    z, turn = drawn(2, 4, 6, 6), complex(math.cos(0.7), math.sin(0.7))
    conv = double(ComplexConv2d(4, 4, 3, bias=False))
    norm = double(ComplexBatchNorm2d(4, mode="magnitude")).train()
    for layer in (conv, nn.AvgPool2d(2), ModReLU(4).double(), ComplexMaxPool2d(2), norm):
        turned, plain = layer(as_pairs(turn * z)), layer(as_pairs(z))
        torch.testing.assert_close(as_complex(turned), turn * as_complex(plain), atol=1e-5, rtol=1e-5)
    for layer in (nn.ReLU(), ZReLU(), Cardioid()):
        turned, plain = as_complex(layer(as_pairs(turn * z))), as_complex(layer(as_pairs(z)))
        assert float((turned - turn * plain).abs().max()) > 0.1
    net = nn.Sequential(conv, ModReLU(4).double(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), ComplexHead(4, 3).double())
    torch.testing.assert_close(net(as_pairs(turn * z)), net(as_pairs(z)), atol=1e-5, rtol=1e-5)


def test_activations_are_what_they_are_called():
    z = torch.tensor([3 + 4j, -3 + 4j, 0.03 + 0.04j, 2 + 0j], dtype=Z).view(1, 4, 1, 1)

    def of(layer):
        return as_complex(layer(as_pairs(z))).flatten().tolist()

    assert of(ZReLU()) == pytest.approx([3 + 4j, 0, 0.03 + 0.04j, 2])
    assert of(ModReLU(4, -0.1).double()) == pytest.approx([2.94 + 3.92j, -2.94 + 3.92j, 0, 1.9])
    assert of(Cardioid()) == pytest.approx([2.4 + 3.2j, 0.2 * (-3 + 4j), 0.8 * (0.03 + 0.04j), 2], abs=1e-6)
    at_zero = torch.zeros(1, 2, 1, 1, requires_grad=True)
    (ModReLU(1)(at_zero).sum() + magnitude(at_zero).sum() + Cardioid()(at_zero).sum()).backward()
    assert bool(torch.isfinite(at_zero.grad).all())


def test_whitening():
    torch.manual_seed(4)
    mixed = torch.randn(64, 3, 2, 5, 5, dtype=torch.float64)
    mixed = torch.einsum("pq,ncqhw->ncphw", torch.tensor([[1.0, 0.0], [0.8, 0.3]], dtype=torch.float64), mixed) + 2
    x = mixed.flatten(1, 2)

    def covariance(y):
        flat = y.unflatten(1, (-1, 2)).permute(1, 2, 0, 3, 4).flatten(2)
        return torch.stack([torch.cov(channel, correction=0) for channel in flat])

    norm = ComplexBatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 0.0]))
    y = norm(x)
    torch.testing.assert_close(covariance(y), torch.eye(2).double().expand(3, 2, 2), atol=1e-3, rtol=0)
    assert float(y.mean((0, 2, 3)).abs().max()) < 1e-9
    # Any invertible mixing of the parts comes out the same but for a rotation.
    mixing = torch.tensor([[0.5, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    other = norm(torch.einsum("pq,ncqhw->ncphw", mixing, mixed).flatten(1, 2))
    one, two = (item.unflatten(1, (-1, 2)).permute(1, 2, 0, 3, 4).flatten(2) for item in (y, other))
    turn = two @ one.transpose(1, 2) / one.shape[2]
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(2).double().expand(3, 2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(turn @ one, two, atol=1e-2, rtol=1e-2)
    naive = ComplexBatchNorm2d(3, mode="naive").double()
    assert float(covariance(naive(x))[:, 0, 1].abs().min()) > 0.5
    expected = nn.BatchNorm2d(6).double()
    naive = ComplexBatchNorm2d(3, mode="naive").double()
    torch.testing.assert_close(naive(x), expected(x))
    torch.testing.assert_close(naive.running_mean.flatten(), expected.running_mean)
    torch.testing.assert_close(naive.running_cov[:, :2].flatten(), expected.running_var)


def test_the_closed_form_is_the_inverse_root():
    torch.manual_seed(5)
    root = torch.randn(100, 2, 2, dtype=torch.float64)
    v = root @ root.transpose(1, 2) + 1e-3 * torch.eye(2).double()
    a, b, c = inverse_root(v[:, 0, 0], v[:, 0, 1], v[:, 1, 1])
    w = torch.stack([torch.stack([a, b], 1), torch.stack([b, c], 1)], 1)
    torch.testing.assert_close(w @ v @ w, torch.eye(2).double().expand(100, 2, 2), atol=1e-8, rtol=0)


def test_norms_fold_to_pairs_and_into_the_convolution_before():
    from convette.surgery import fold

    torch.manual_seed(6)
    for mode in ("whiten", "naive", "magnitude"):
        model = nn.Sequential(ComplexConv2d(3, 4, 3, complexify="zero"), ComplexBatchNorm2d(4, mode=mode), nn.ReLU())
        x = torch.randn(16, 3, 8, 8)
        for _ in range(3):
            model(x)
        expected = model.eval()(x)
        folded = fold_layers(model)
        assert not folded.kept
        torch.testing.assert_close(folded.model(x), expected, atol=1e-5, rtol=1e-5)
        whole = fold(model, x)
        torch.testing.assert_close(whole(x), expected, atol=1e-5, rtol=1e-5)
        assert sum(isinstance(module, nn.Conv2d) for module in whole.modules()) == 1
        assert not any(isinstance(module, ComplexBatchNorm2d) for module in whole.modules())


def test_what_a_batch_norm_has_learned_is_taken_over():
    torch.manual_seed(7)
    norm, x = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm(x)
    layer = ComplexBatchNorm2d(3)
    layer.take_over(norm.eval())
    real, imaginary = parts(layer.eval()(complexified(x, "zero")))
    torch.testing.assert_close(real, norm(x), atol=1e-5, rtol=1e-5)
    assert float(imaginary.detach().abs().max()) == 0


def test_counts_and_starts():
    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    assert count(ComplexConv2d(3, 8, 3)) == 2 * count(nn.Conv2d(3, 8, 3))
    assert [count(ComplexBatchNorm2d(8, mode=mode)) for mode in ("whiten", "naive", "magnitude")] == [40, 32, 8]
    model = create_model("resnet20", seed=0)
    norms = sum(count(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    rest = count(model) - norms - count(model.linear)
    assert count(to_complex(model)) == 2 * rest + norms // 2 * 5 + 650
    for init in ("kaiming", "rayleigh"):
        layer = ComplexConv2d(64, 64, 3, init=init)
        for part in (layer.real, layer.imaginary):
            assert float(part.var()) == pytest.approx(1 / 576, rel=0.05)
    torch.manual_seed(8)
    x, sizes = torch.randn(2, 128, 6, 6), []
    with torch.no_grad():
        for _ in range(20):
            x = ComplexConv2d(64, 64, 1, bias=False)(x)
            sizes.append(float(x.var()))
            x = x.relu()
    assert 1 / 3 < sizes[-1] / sizes[0] < 3


def test_pooling_takes_numbers_that_are_there():
    torch.manual_seed(9)
    z = drawn(2, 3, 6, 6)
    pooled = as_complex(ComplexMaxPool2d(2)(as_pairs(z)))
    torch.testing.assert_close(pooled.abs(), functional.max_pool2d(z.abs(), 2))
    windows = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert bool((windows == pooled.unsqueeze(-1)).any(-1).all())
    assert ComplexMaxPool2d(3, 2, 1)(as_pairs(z)).shape == (2, 6, 3, 3)


def test_dropout_takes_both_parts():
    torch.manual_seed(10)
    for layer, x in (
        (ComplexDropout(0.5), torch.ones(4, 6, 5, 5)),
        (ComplexDropout(0.5, maps=True), torch.ones(32, 6, 5, 5)),
    ):
        a, b = parts(layer(x))
        assert torch.equal(a, b) and 0.3 < float((a == 0).float().mean()) < 0.7
        if layer.maps:
            assert bool(((a == 0).all((2, 3)) | (a == 2).all((2, 3))).all())
        assert torch.equal(layer.eval()(x), x)


def test_gradients():
    torch.manual_seed(11)
    z = drawn(2, 2, 3, 3).requires_grad_()
    layer = double(ComplexConv2d(2, 2, 2))
    assert torch.autograd.gradcheck(layer, (z,))
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = double(ComplexBatchNorm2d(2)).train()
    assert torch.autograd.gradcheck(norm, (x,))


def test_images_become_complex():
    torch.manual_seed(12)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(as_complex(complexified(x, "fft")), torch.fft.fft2(x, norm="ortho"))
    wave = torch.cos(2 * math.pi * torch.arange(16.0) * 3 / 16).expand(1, 1, 4, 16)
    torch.testing.assert_close(magnitude(complexified(wave, "analytic")), torch.ones(1, 1, 4, 16), atol=1e-5, rtol=0)
    assert complexified(x, "pair") is x
    assert as_pairs(x) is x


def test_a_real_network_made_complex_keeps_its_function():
    from torchvision.models import vgg11_bn

    torch.manual_seed(13)
    model = create_model("resnet20", num_classes=4, seed=0)
    x = torch.randn(4, 3, 16, 16)
    model(x)
    expected = model.eval()(x)
    for head in ("abs", "real", "concat"):
        made = to_complex(create_model("resnet20", num_classes=4, seed=0), head)
        assert made(x).shape == (4, 4)
    assert sum(isinstance(m, OnParts) for m in made.modules()) == 2  # shortcuts that pad channels
    torch.testing.assert_close(to_complex(model, keep=True)(x), expected, atol=1e-4, rtol=1e-4)
    vgg = vgg11_bn(num_classes=3)
    vgg.classifier = nn.Linear(512 * 49, 3)
    to_complex(vgg, complexify="fft", activation="modrelu", norm="magnitude")
    assert any(isinstance(m, ModReLU) for m in vgg.modules()) and any(
        isinstance(m, ComplexMaxPool2d) for m in vgg.modules()
    )


def test_arms_of_a_fair_study():
    torch.manual_seed(14)

    def build():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    arms = study_arms(build, torch.randn(2, 1, 8, 8), complexify="zero")
    sizes = {name: sum(p.numel() for p in arm.parameters()) for name, arm in arms.items()}
    assert sizes["cnn_x2"] == pytest.approx(2 * sizes["cnn"], rel=0.02)
    assert [arm(torch.randn(2, 1, 8, 8)).shape for arm in arms.values()] == [(2, 4)] * 3
    resnet = create_model("resnet20", seed=0)
    twin = match_params(resnet, torch.randn(1, 3, 16, 16), 1.5)
    ratio = sum(p.numel() for p in twin.parameters()) / sum(p.numel() for p in resnet.parameters())
    assert ratio == pytest.approx(1.5, rel=0.02)


def test_refusals():
    with pytest.raises(UsageError, match="'quaternion' is none of"):
        ComplexConv2d(2, 2, 3, method="quaternion")
    with pytest.raises(UsageError, match="expected pairs"):
        ComplexConv2d(2, 2, 3)(torch.zeros(1, 2, 5, 5))
    with pytest.raises(UsageError, match="at least 2"):
        ComplexBatchNorm2d(2)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(UsageError, match="start at 0 or below"):
        ModReLU(2, 0.1)
    with pytest.raises(UsageError, match="GroupNorm, which has no complex form"):
        to_complex(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(UsageError, match="no pairs"):
        to_complex(create_model("resnet20"), complexify="pair")
    with pytest.raises(UsageError, match="head 'angle'"):
        ComplexHead(2, 2, head="angle")
