"""Published counts, shapes and limiting cases of the networks of our own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette import models
from convette.errors import UsageError
from convette.models.cifar_resnet import ZeroPadShortcut
from convette.models.mobilenet_v2 import round8

_SPEC = importlib.util.spec_from_file_location("models_counting", Path(__file__).with_name("counting.py"))
counting = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(counting)
count_macs, count_parameters = counting.count_macs, counting.count_parameters


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet8", 75_290, 12_239_488),
        ("resnet20", 269_722, 40_551_040),
        ("resnet32", 464_154, 68_862_592),
        ("resnet44", 658_586, 97_174_144),
        ("resnet56", 853_018, 125_485_696),
        ("resnet110", 1_727_962, 252_887_680),
        ("simplenet_cifar_310k", 312_362, 55_788_160),
        ("simplenet_cifar_460k", 385_790, 73_189_864),
        ("simplenet_cifar_5m", 5_498_378, 652_151_296),
        ("simplenet_cifar_5m_extra_pool", 5_498_378, 631_507_456),
    ],
)
def test_published_counts_on_cifar(name, parameters, macs):
    model = models.create_model(name)
    assert count_parameters(model) == parameters
    assert count_macs(model, 3, 32, 32) == macs


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("simplenet_cifar_310k", 318_212),
        ("simplenet_cifar_460k", 394_880),
        ("simplenet_cifar_5m", 5_521_508),
        ("simplenet_cifar_5m_extra_pool", 5_521_508),
    ],
)
def test_published_counts_with_100_classes(name, parameters):
    assert count_parameters(models.create_model(name, num_classes=100)) == parameters


def test_published_count_on_mnist():
    assert count_parameters(models.simplenet_cifar_5m(10, 1)) == 5_497_226


_IMAGENET = {
    ("simplenet_5m", 1.0): (5_752_808, (1_341_761_536, 1_688_578_048, 2_035_394_560, 2_729_027_584)),
    ("simplenet_5m", 0.75): (3_287_272, (758_853_120, 953_937_408, 1_149_021_696, 1_539_190_272)),
    ("simplenet_5m", 0.5): (1_506_792, (340_923_392, 427_627_520, 514_331_648, 687_739_904)),
    ("simplenet_9m", 1.0): (9_508_968, (2_774_249_984, 3_554_587_136, 4_334_924_288, 6_415_823_360)),
}


@pytest.mark.parametrize(("name", "scale"), _IMAGENET)
@pytest.mark.parametrize("mode", ["m1", "m2", "m3", "m4"])
def test_published_simplenet_counts_on_imagenet(name, scale, mode):
    parameters, macs = _IMAGENET[name, scale]
    with torch.device("meta"):
        model = getattr(models, name)(mode=mode, scale=scale)
    assert count_parameters(model) == parameters
    assert count_macs(model, 3, 224, 224) == macs[int(mode[1]) - 1]


@pytest.mark.parametrize(
    ("width", "parameters", "macs"),
    [
        (0.35, 1_677_128, 59_285_808),
        (0.5, 1_968_680, 97_131_840),
        (0.75, 2_636_424, 209_069_792),
        (1.0, 3_504_872, 300_774_272),
        (1.3, 5_386_792, 509_374_560),
        (1.4, 6_108_776, 582_195_824),
    ],
)
def test_published_mobilenet_counts(width, parameters, macs):
    model = models.create_model(f"mobilenet_v2_{round(width * 100):03d}", num_classes=1000)
    assert count_parameters(model) == parameters
    assert count_macs(model, 3, 224, 224) == macs


def test_ssdlite_has_the_published_cost():
    """Published for 80 classes (and background): 4.3 M parameters, 0.8 G MACs at 320 px."""
    model = models.ssdlite_mobilenet_v2(81)
    assert round(count_parameters(model) / 1e6, 1) == 4.3
    assert round(count_macs(model, 3, 320, 320) / 1e9, 1) == 0.8


def test_deeplab_has_the_published_cost():
    """Published at output stride 16 and 513 px: 2.11 M parameters, 2.75 G MACs (ours 2.741: within half a percent)."""
    model = models.deeplabv3_mobilenet_v2(21)
    assert round(count_parameters(model) / 1e6, 2) == 2.11
    assert abs(count_macs(model, 3, 513, 513) / 2.75e9 - 1) < 0.005


def test_ssdlite_maps_and_anchors():
    model = models.ssdlite_mobilenet_v2(5, width=0.35).eval()
    images = torch.randn(2, 3, 320, 320)
    with torch.no_grad():
        sides = [m.shape[-1] for m in model.maps(images)]
        boxes, classes = model(images)
    assert sides == [20, 10, 5, 3, 2, 1]
    anchors = 3 * 400 + 6 * (100 + 25 + 9 + 4 + 1)
    assert boxes.shape == (2, anchors, 4) and classes.shape == (2, anchors, 5)


def test_ssdlite_taps_the_expansion_before_its_depthwise():
    model = models.ssdlite_mobilenet_v2(5).eval()
    with torch.no_grad():
        tapped = model.maps(torch.randn(1, 3, 320, 320))[0]
    assert tapped.shape[1] == 576 and tapped.min() >= 0 and tapped.max() <= 6


@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplab_keeps_resolution_and_dilates_after_the_stride(output_stride):
    model = models.deeplabv3_mobilenet_v2(4, width=0.35, output_stride=output_stride).eval()
    with torch.no_grad():
        assert model.features(torch.randn(1, 3, 65, 65)).shape[-1] == -(-65 // output_stride)
        assert model(torch.randn(1, 3, 65, 65)).shape == (1, 4, 65, 65)
    depthwise = [m for m in model.features.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    dilations = [m.dilation[0] for m in depthwise]
    # The block whose stride is taken out keeps its dilation: the 7th (to stride 16) and the 14th (to stride 32).
    assert dilations == ([1] * 14 + [2] * 3 if output_stride == 16 else [1] * 7 + [2] * 7 + [4] * 3)


def test_mobilenet_blocks():
    model = models.mobilenet_v2(10)
    blocks = [m for m in model.modules() if isinstance(m, models.InvertedResidual)]
    assert len(blocks) == 17 and sum(b.residual for b in blocks) == 10
    assert len(blocks[0].conv) == 3 and len(blocks[1].conv) == 4  # no expansion where t = 1
    with torch.no_grad():
        assert model.eval().features(torch.randn(1, 3, 224, 224)).shape == (1, 1280, 7, 7)


def test_inverted_residual_is_linear_at_its_end_and_identity_when_its_scale_is_zero():
    block = models.InvertedResidual(16, 16).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert (block.conv(x)).min() < 0
        block.conv[-1].weight.zero_()
        assert torch.equal(block(x), x)


@given(st.floats(min_value=0.5, max_value=2000))
def test_round8_is_near_and_never_below_ninety_percent(channels):
    rounded = round8(channels)
    assert rounded % 8 == 0 and rounded >= 8
    assert rounded >= 0.9 * channels
    assert rounded <= max(8, 1.1 * channels + 8)


def test_round8_published_values():
    assert round8(0.35 * 24) == 8 and round8(0.35 * 32) == 16


@pytest.mark.parametrize("side", [8, 28, 32, 64])
@pytest.mark.parametrize("name", ["simplenet_cifar_310k", "simplenet_5m_m4_050", "mobilenet_v2_035", "resnet20"])
def test_small_stem_accepts_small_images(name, side):
    model = models.create_model(name, num_classes=7, in_channels=1, stem="small").eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 7) and logits.isfinite().all()


def test_small_stem_keeps_resolution():
    small, default = models.mobilenet_v2(stem="small", width=0.35).eval(), models.mobilenet_v2(width=0.35).eval()
    with torch.no_grad():
        assert small.features(torch.randn(1, 3, 32, 32)).shape[-1] == 4
        assert default.features(torch.randn(1, 3, 32, 32)).shape[-1] == 1
    assert count_parameters(small) == count_parameters(default)


def test_simplenet_features_before_the_head():
    with torch.no_grad():
        assert models.simplenet_cifar_310k().eval().features(torch.randn(1, 3, 32, 32)).shape == (1, 64, 2, 2)
        assert models.simplenet_5m(scale=0.5).eval().features(torch.randn(1, 3, 224, 224)).shape[-2:] == (7, 7)


def test_simplenet_refuses_images_that_vanish():
    with pytest.raises(UsageError, match=r"stem 'small'"):
        models.simplenet_cifar_310k()(torch.randn(2, 3, 8, 8))


def test_simplenet_pools_the_maximum():
    """Adding a constant at one position of the last map can change the output; permuting positions cannot."""
    model = models.simplenet_cifar_310k().eval()
    maps = model.features(torch.randn(1, 3, 32, 32)).detach()

    def head(x):
        return model.classifier(torch.amax(x, dim=(2, 3)))

    assert torch.equal(head(maps), head(maps.flip(2)))
    raised = maps.clone()
    raised[:, :, 0, 0] += maps.max()
    assert not torch.equal(head(raised), head(maps))


def test_simplenet_layers_are_as_published():
    model = models.simplenet_cifar_5m()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convolutions].count((3, 3)) == 11 and len(convolutions) == 13
    assert all(m.bias is not None and m.padding == (m.kernel_size[0] // 2,) * 2 for m in convolutions)
    bound = (6 / (9 * 3 + 9 * 64)) ** 0.5 * 2**0.5  # Xavier uniform with gain sqrt(2)
    assert 0.95 * bound < convolutions[0].weight.abs().max() <= bound


def test_simplenet_dropout_rates():
    rates = [0.0] * 17 + [0.5]
    rates[3] = 0.2
    plan = "64 128 128 128 P 128 128 256 P 256 256 P 512 k2048 k256 P 256"
    model = models.SimpleNet(plan, dropout=rates)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.2]
    assert isinstance(model.dropout, nn.Dropout) and model.dropout.p == 0.5
    with pytest.raises(UsageError, match="18"):
        models.SimpleNet(plan, dropout=[0.1, 0.2])
    with pytest.raises(UsageError, match="'x5'"):
        models.SimpleNet("64 x5")


def test_zero_pad_shortcut_by_its_definition():
    x = torch.randn(2, 4, 6, 6)
    y = ZeroPadShortcut(2, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 6:].any()


def test_resnet_depth_must_be_6n_plus_2():
    with pytest.raises(ValueError, match="6n"):
        models.CifarResNet(21)


@pytest.mark.parametrize(
    "make", [models.resnet20, models.simplenet_cifar_310k, lambda: models.mobilenet_v2(10, width=0.35)]
)
def test_gradients_reach_every_parameter(make):
    model = make()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet20", "simplenet_cifar_310k", "mobilenet_v2_035"])
def test_torch_export_with_any_batch_size(name):
    model = models.create_model(name, stem="small", seed=0).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=6, deadline=None)
@given(side=st.integers(8, 40), channels=st.integers(1, 4), classes=st.integers(1, 12))
def test_any_size_channels_and_classes(side, channels, classes):
    for name in ("resnet20", "mobilenet_v2_035"):
        model = models.create_model(name, num_classes=classes, in_channels=channels, stem="small", seed=0).eval()
        with torch.no_grad():
            assert model(torch.randn(1, channels, side, side)).shape == (1, classes)
