"""BNET: batch norm at k = 1 and with a Dirac kernel, published counts, placement, conversion."""

import copy

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.normalization import BNET2d, upgrade_norm


def trained_batch_norm(channels=4):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()
    norm(torch.randn(16, channels, 5, 5) * 2 + 1)
    return norm


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_from_a_batch_norm_it_computes_the_same_everywhere(k):
    norm = trained_batch_norm()
    layer = BNET2d.from_batch_norm(norm, k)
    torch.manual_seed(1)
    for _ in range(3):
        x = torch.randn(4, 4, 6, 5)
        torch.testing.assert_close(layer(x), norm(x), atol=2e-6, rtol=1e-5)
    layer.eval(), norm.eval()
    torch.testing.assert_close(layer(x), norm(x), atol=2e-6, rtol=1e-5)
    fresh, plain = BNET2d(4, k).train(), nn.BatchNorm2d(4)
    torch.testing.assert_close(fresh(x), plain(x), atol=2e-6, rtol=1e-5)


def test_resnet50_counts_and_macs():
    from torchvision.models import resnet50

    for k, expected in ((3, 25_677_864), (5, 25_919_528), (7, 26_282_024)):
        with torch.device("meta"):
            model = resnet50()
            upgrade_norm(model, k=k)
        assert sum(p.numel() for p in model.parameters()) == expected
    layers = [module for module in model.modules() if isinstance(module, BNET2d)]
    assert len(layers) == 16 and sum(layer.num_features for layer in layers) == 15_104
    assert all(isinstance(block.bn3, BNET2d) and isinstance(block.bn2, nn.BatchNorm2d) for block in model.layer1)


def test_macs_are_those_of_a_depthwise_convolution():
    from convette.cost import count

    x = torch.randn(1, 4, 6, 5)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), BNET2d(4))
    plain = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert count(model, x).macs - count(plain, x).macs == 9 * 4 * 30
    assert sum(p.numel() for p in model[1].parameters()) == (9 + 1) * 4


def test_zero_init_starts_blocks_at_their_shortcut():
    from convette.models import resnet20

    torch.manual_seed(2)
    model = upgrade_norm(resnet20(), keep_function=False)
    block = model.layer1[1]
    x = torch.randn(2, 16, 8, 8)
    y = block.train()(x)
    assert torch.equal(y, x.relu())
    y.square().sum().backward()
    assert float(block.bn2.conv.weight.grad.abs().max()) > 0
    assert float(block.conv1.weight.grad.abs().max()) == 0


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "torchvision:resnet18", "timm:efficientnet_lite0"])
def test_upgrading_keeps_the_function(name):
    from convette.models import create_model

    model = create_model(name, num_classes=4, seed=0).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    upgrade_norm(model)
    assert sum(isinstance(module, BNET2d) for module in model.modules()) >= 8
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_without_a_shortcut_a_new_kernel_is_dirac():
    from convette.models import create_model

    model = upgrade_norm(create_model("mobilenet_v2", seed=0), keep_function=False)
    starts = {bool((module.conv.weight == 0).all()) for module in model.modules() if isinstance(module, BNET2d)}
    assert starts == {True, False}


def test_shift_equivariance_and_constant_channels():
    torch.manual_seed(3)
    layer = BNET2d(2, 3).double()
    with torch.no_grad():
        layer.conv.weight.normal_(), layer.conv.bias.normal_()
    layer.eval()
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    moved = layer(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[..., 3:-2, 4:-3], layer(x).roll((1, 2), (2, 3))[..., 3:-2, 4:-3])
    flat = layer.train()(torch.full_like(x, 7.0))
    torch.testing.assert_close(flat, layer.conv.bias.view(1, -1, 1, 1).expand_as(flat))


def test_surgery_folds_the_standardisation():
    from convette.surgery import fold

    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BNET2d(4), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    model(x)
    folded = fold(model.eval(), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


def test_folds_for_k_1_only():
    norm = trained_batch_norm().eval()
    x = torch.randn(2, 4, 5, 5)
    plain = BNET2d.from_batch_norm(norm, 1).folded()
    assert type(plain) is nn.BatchNorm2d
    torch.testing.assert_close(plain(x), norm(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(Stays, match="depthwise"):
        BNET2d(4, 3).folded()


def test_gradcheck_freezing_and_importance():
    torch.manual_seed(5)
    layer = BNET2d(2).double().train()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    layer.freeze()
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.importance().tolist() == [1.0, 1.0]
    assert copy.deepcopy(layer).num_features == 2


def test_refusals():
    with pytest.raises(UsageError, match="odd"):
        BNET2d(3, 4)
    with pytest.raises(UsageError, match="found no batch norm"):
        upgrade_norm(nn.Sequential(nn.Conv2d(1, 1, 1)))
