"""IBN-Net: limiting ratios, invariance, order, published counts, placement on networks of three libraries."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import IBN, resnet50_ibn_a, resnet50_ibn_b, to_ibn
from convette.models import create_model, load, save


def test_ratios_0_and_1_are_the_normalisers():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5) * 2 + 1
    for ratio, plain in ((0.0, nn.BatchNorm2d(6)), (1.0, nn.InstanceNorm2d(6, affine=True))):
        layer = IBN(6, ratio)
        assert torch.equal(layer(x), plain(x)) and type(layer.folded()) is type(plain)
        assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("channels", [5, 6, 7])
@pytest.mark.parametrize("ratio", [0.4, 0.5])
@pytest.mark.parametrize("order", ["in-first", "bn-first"])
def test_parts_in_order(channels, ratio, order):
    torch.manual_seed(1)
    layer = IBN(channels, ratio, order=order)
    x = torch.randn(4, channels, 4, 4)
    instance, batch = nn.InstanceNorm2d(channels)(x), nn.BatchNorm2d(channels)(x)
    y = layer(x)
    if order == "in-first":
        assert layer.instances == int(channels * ratio)
        expected = torch.cat([instance[:, : layer.instances], batch[:, layer.instances :]], 1)
    else:
        rest = int(channels * (1 - ratio))
        assert layer.instances == channels - rest
        expected = torch.cat([batch[:, :rest], instance[:, rest:]], 1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_contrast_and_brightness_do_not_reach_the_instance_half():
    torch.manual_seed(2)
    layer = IBN(6).eval()
    x = torch.randn(4, 6, 8, 8)
    a, b = torch.rand(4, 6, 1, 1) + 0.5, torch.randn(4, 6, 1, 1)
    torch.testing.assert_close(layer(a * x + b)[:, :3], layer(x)[:, :3], atol=1e-4, rtol=1e-4)
    assert float((layer(a * x + b)[:, 3:] - layer(x)[:, 3:]).abs().max()) > 0.1
    layer.train()
    alone, together = layer(x[:2])[:1], layer(x)[:1]
    torch.testing.assert_close(alone[:, :3], together[:, :3], atol=1e-5, rtol=1e-5)
    assert float((alone[:, 3:] - together[:, 3:]).abs().max()) > 1e-3


def test_published_counts():
    with torch.device("meta"):
        a, b = resnet50_ibn_a(), resnet50_ibn_b()
    assert sum(p.numel() for p in a.parameters()) == 25_557_032
    assert sum(p.numel() for p in b.parameters()) == 25_558_568
    assert [sum(isinstance(m, IBN) for m in getattr(a, f"layer{i}").modules()) for i in (1, 2, 3, 4)] == [3, 4, 6, 0]
    assert isinstance(b.bn1, nn.InstanceNorm2d) and not any(isinstance(m, IBN) for m in b.modules())
    tails = [name for name, m in b.named_modules() if isinstance(m, nn.InstanceNorm2d)]
    assert tails == ["bn1", "layer1.2.tail", "layer2.3.tail"]


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "timm:resnet26"])
@pytest.mark.parametrize("variant", ["a", "b"])
def test_networks_of_every_library(name, variant):
    from convette.models import create_model

    model = create_model(name, num_classes=4, stem="small", seed=0)
    width = 16 if name == "resnet20" else 64
    keys = set(model.state_dict())
    to_ibn(model, variant)
    x = torch.randn(2, 3, 32, 32)
    assert model.train()(x).shape == (2, 4) and bool(torch.isfinite(model.eval()(x)).all())
    if variant == "a":
        norm = model.layer1[0].bn1
        assert isinstance(norm, IBN) and norm.instances == width // 2
        assert not any(isinstance(m, IBN) for m in (model.layer3 if name == "resnet20" else model.layer4).modules())
    else:
        assert len(keys - set(model.state_dict())) == 3  # the stem has no statistics any more


def test_the_stem_variant_sees_less_of_contrast_and_brightness():
    from convette.models import create_model

    torch.manual_seed(3)
    x = torch.randn(8, 3, 32, 32)
    changes = {}
    for variant in (None, "b"):
        model = create_model("resnet20", num_classes=10, seed=1)
        if variant:
            to_ibn(model, variant)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.padding_mode = "reflect"
                module._reversed_padding_repeated_twice = [1, 1, 1, 1]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()
        with torch.no_grad():
            model(x)
            model.eval()
            clean, changed = model(x), model(1.5 * x + 0.7)
        changes[variant] = float((changed - clean).norm() / clean.norm())
    assert changes["b"] < 0.2 * changes[None]


def test_group_norm_beside_instance_norm_needs_no_batch():
    layer = IBN(6, other="group").train()
    x = torch.randn(1, 6, 4, 4)
    assert torch.equal(layer(x), layer.eval()(x))


def test_refusals():
    with pytest.raises(UsageError, match="ratio"):
        IBN(4, 1.5)
    with pytest.raises(UsageError, match="1x1"):
        IBN(4).eval()(torch.randn(2, 4, 1, 1))
    with pytest.raises(UsageError, match="no residual blocks"):
        to_ibn(nn.Sequential(nn.Conv2d(1, 1, 1)))
    from convette.models import resnet20

    with pytest.raises(UsageError, match="last stage"):
        to_ibn(resnet20(), "a", 3)
    mixed = to_ibn(resnet20(), cfg=("a", "b"))
    assert isinstance(mixed.layer1[0].bn1, IBN) and isinstance(mixed.layer2[2].tail, nn.InstanceNorm2d)


@pytest.mark.parametrize("name", ["torchvision:densenet121", "timm:densenet121"])
def test_densenets_put_instance_norm_last_in_the_first_norms_of_their_layers(name):
    model = create_model(name, num_classes=4, seed=0)
    before = sum(p.numel() for p in model.parameters())
    to_ibn(model, stages=1)
    found = [module for module in model.modules() if isinstance(module, IBN)]
    assert len(found) == 6 and all(one.order == "bn-first" for one in found)
    width = found[0].BN.num_features + found[0].instances
    assert found[0].BN.num_features == int(width * 0.6)
    assert sum(p.numel() for p in model.parameters()) == before
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(UsageError, match="variant 'a'"):
        to_ibn(create_model(name, num_classes=4, seed=0), "b")


def test_the_ready_networks_know_how_they_were_built(tmp_path):
    model = resnet50_ibn_a(4).eval()
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))
