"""Lateral inhibition: its kernel, Mach bands, limits, both modes, the ring, and where it is put."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.activation import (
    LateralInhibition2d,
    RingInhibitedConv2d,
    add_inhibition,
    inhibition_sites,
    surround_kernel,
)


def test_kernel():
    kernel = surround_kernel()
    assert kernel[0, 1] == pytest.approx(0.1556, abs=5e-5) and kernel[0, 0] == pytest.approx(0.0944, abs=5e-5)
    large = surround_kernel(2)
    assert [round(float(large[i]), 4) for i in ((2, 1), (1, 1), (0, 0))] == [0.1173, 0.0712, 0.0035]
    for k in (kernel, large, surround_kernel(3, 2.0)):
        assert float(k.sum()) == pytest.approx(1, abs=1e-6) and k[len(k) // 2, len(k) // 2] == 0
        torch.testing.assert_close(k, k.rot90()), torch.testing.assert_close(k, k.flip(0))


def test_zero_tau_is_bit_exact_and_constants_and_spikes_follow():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(LateralInhibition2d(3, init=0.0)(x), x)
    layer = LateralInhibition2d(1, 2, init=0.3)
    torch.testing.assert_close(layer(torch.full((1, 1, 4, 4), 2.0)), torch.full((1, 1, 4, 4), 1.4))
    gained = LateralInhibition2d(1, init=0.3, contrast=True)
    torch.testing.assert_close(gained(torch.full((1, 1, 3, 3), 2.0)), torch.full((1, 1, 3, 3), 2 * 1.3 * 0.7))
    spike = torch.zeros(1, 1, 7, 7)
    spike[..., 3, 3] = 5
    expected = -0.3 * 5 * surround_kernel(2)
    expected[2, 2] = 5
    torch.testing.assert_close(layer(spike)[0, 0, 1:-1, 1:-1], expected)


def test_mach_bands():
    x = torch.zeros(1, 1, 9, 12)
    x[..., 6:] = 1
    row = LateralInhibition2d(1, 2, init=0.5)(x)[0, 0, 4]
    torch.testing.assert_close(
        row[[0, 5, 6, 7, 11]], torch.tensor([0, -0.1782, 0.6782, 0.5325, 0.5]), atol=1e-4, rtol=0
    )


def test_modes():
    torch.manual_seed(1)
    x, z = torch.randn(2, 2, 3, 6, 5)
    assert bool((LateralInhibition2d(3, init=0.4)(x) <= x).all())
    linear = LateralInhibition2d(3, mode="linear", init=0.4)
    torch.testing.assert_close(linear(2 * x - z), 2 * linear(x) - linear(z))
    assert bool((linear(x) > x).any())


@pytest.mark.parametrize("turn", [lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.flip(2)])
def test_turns_with_its_input(turn):
    x = torch.randn(1, 2, 6, 6)
    layer = LateralInhibition2d(2, 2, init=0.5)
    torch.testing.assert_close(layer(turn(x)), turn(layer(x)))


def test_gradients():
    torch.manual_seed(2)
    layer = LateralInhibition2d(2, init=0.2).double()
    x = (torch.randn(2, 2, 4, 3, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, tau: layer(x), (x, layer.tau))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.tau.grad, -layer.inhibition(x).sum((0, 2, 3)))


def test_tau_outside_its_bounds_can_come_back_and_no_further():
    layer = LateralInhibition2d(2)
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([-0.5, 1.5]))
    assert layer.strength().tolist() == pytest.approx([0, 0.9])
    for sign, reached in ((1, [False, True]), (-1, [True, False])):
        layer.tau.grad = None
        (sign * layer.strength()).sum().backward()
        assert (layer.tau.grad != 0).tolist() == reached


def test_ring():
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    ring = RingInhibitedConv2d(4, 6, 3, stride=2, padding=1, groups=2, init=0.0)
    ring.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 4, 7, 9)
    assert torch.equal(ring(x), plain(x)) and torch.equal(ring.folded()(x), plain(x))
    torch.testing.assert_close(ring.ring_mean(torch.full_like(x, 3.0)), torch.full((2, 4, 4, 5), 3.0))
    with torch.no_grad():
        ring.strength.fill_(0.2)
    expected = torch.zeros(2, 4, 4, 5)
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    for i in range(4):
        for j in range(5):
            window = padded[:, :, 2 * i : 2 * i + 5, 2 * j : 2 * j + 5]
            expected[:, :, i, j] = (window.sum((2, 3)) - window[:, :, 1:4, 1:4].sum((2, 3))) / 16
    torch.testing.assert_close(ring.ring_mean(x), expected)
    strengths = ring.weight.abs().mean((2, 3), keepdim=True)
    torch.testing.assert_close(ring(x), plain(x) - 0.2 * nn.functional.conv2d(expected, strengths, groups=2))
    double = ring.double()
    assert torch.autograd.gradcheck(double, (x[:1, :, :4, :4].double().requires_grad_(),))
    with pytest.raises(Stays, match="borders"):
        ring.folded()


def test_folds():
    x = torch.randn(2, 3, 5, 4)
    assert type(LateralInhibition2d(3, init=0.0).folded()) is nn.Identity
    for contrast in (False, True):
        layer = LateralInhibition2d(3, 2, "linear", init=0.4, contrast=contrast).eval()
        plain = layer.folded()
        assert type(plain) is nn.Conv2d
        torch.testing.assert_close(plain(x), layer(x))
    with pytest.raises(Stays, match="signs"):
        LateralInhibition2d(3).folded()


def test_vgg16_has_4224_more_parameters_at_all_13_sites():
    from torchvision.models import vgg16

    with torch.device("meta"):
        model = vgg16()
        before = sum(p.numel() for p in model.parameters())
        add_inhibition(model, "all")
    assert len(inhibition_sites(model, "all")) == 13
    assert sum(p.numel() for p in model.parameters()) - before == 4224
    assert isinstance(model.features[0][1], LateralInhibition2d) and isinstance(model.features[1], nn.ReLU)


@pytest.mark.parametrize(
    ("name", "sites"),
    [("resnet20", 3), ("torchvision:resnet18", 4), ("timm:resnet50", 4), ("timm:efficientnet_lite0", None)],
)
@pytest.mark.parametrize("mode", ["surround", "ring"])
def test_added_to_networks_it_starts_by_changing_nothing(name, sites, mode, tmp_path):
    from convette.models import create_model, load, save

    model = create_model(name, num_classes=3, seed=0).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    if sites is None:  # all its convolutions of 3x3 but the stem are depthwise
        assert inhibition_sites(model, "all") == ["conv_stem"]
        with pytest.raises(UsageError, match="no 3x3"):
            add_inhibition(model, mode=mode)
        return
    add_inhibition(model, mode=mode)
    kind = LateralInhibition2d if mode == "surround" else RingInhibitedConv2d
    assert sum(isinstance(module, kind) for module in model.modules()) == sites
    assert torch.equal(model(x), expected)
    if name == "resnet20":
        save(model, tmp_path / "m.safetensors")
        assert torch.equal(load(tmp_path / "m.safetensors")(x), expected)


def test_in_a_segmentation_network_the_head_is_left_alone():
    from torchvision.models.segmentation import fcn_resnet50

    with torch.device("meta"):
        model = add_inhibition(fcn_resnet50(weights=None, weights_backbone=None))
    found = [name for name, module in model.named_modules() if isinstance(module, LateralInhibition2d)]
    assert found == [f"backbone.layer{i}.{last}.bn2.1" for i, last in ((1, 2), (2, 3), (3, 5), (4, 2))]


def test_macs():
    from convette.cost import count

    assert count(LateralInhibition2d(4, 2), torch.randn(1, 4, 6, 5)).macs == 25 * 4 * 30


def test_it_stands_between_norm_and_activation():
    from convette.models import create_model

    model = add_inhibition(create_model("timm:efficientnet_lite0", seed=0), "all", init=0.1)
    assert isinstance(model.bn1.drop[1], LateralInhibition2d) and isinstance(model.bn1.act, nn.ReLU6)
    bottleneck = add_inhibition(create_model("timm:resnet50", seed=0)).layer4[-1]
    assert isinstance(bottleneck.bn2[1], LateralInhibition2d) and isinstance(bottleneck.bn3, nn.BatchNorm2d)


def test_refusals():
    with pytest.raises(UsageError, match="radius 0"):
        LateralInhibition2d(2, 0)
    with pytest.raises((UsageError, TypeCheckError), match="rectified"):
        LateralInhibition2d(2, mode="x")
    with pytest.raises(UsageError, match="most"):
        LateralInhibition2d(2, init=1.0)
    with pytest.raises(UsageError, match="dilation"):
        RingInhibitedConv2d(2, 2, 3, dilation=2)
    with pytest.raises((UsageError, TypeCheckError), match="stage_end"):
        add_inhibition(nn.Sequential(nn.Conv2d(1, 2, 3)), "x")
    with pytest.raises(UsageError, match="no 3x3"):
        add_inhibition(nn.Sequential(nn.Conv2d(1, 2, 1)), "all")
