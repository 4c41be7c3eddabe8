"""ATAC: published counts, locality, limits of the gate, folds, and where it is put."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.activation import ATAC, ATACBottleneck, ATACResNet, replace_activation


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("c", "expected"), [(16, 304), (32, 1120), (64, 4288), (256, 66_304), (512, 263_680)])
def test_parameters_and_macs_of_a_unit(c, expected):
    from convette.cost import count as cost

    unit = ATAC(c)
    assert count(unit) == expected
    assert cost(unit, torch.randn(1, c, 3, 5)).macs == 2 * c * (c // 2) * 15


@pytest.mark.parametrize(
    ("blocks", "classes", "relu", "atac"),
    [
        (1, 10, 77_850, 89_578),
        (2, 10, 175_066, 198_218),
        (3, 10, 272_282, 306_858),
        (5, 10, 466_714, 524_138),
        (3, 100, 278_132, 312_708),
    ],
)
def test_parameters_of_the_papers_networks(blocks, classes, relu, atac):
    assert count(ATACResNet(blocks, classes, act_layers=0)) == relu
    assert count(ATACResNet(blocks, classes)) == atac


def test_places_are_filled_from_the_back():
    used = [sum(isinstance(m, ATAC) for m in ATACResNet(1, act_layers=k).modules()) for k in range(5)]
    assert used == [0, 1, 3, 5, 7]
    assert isinstance(ATACResNet(1, act_layers=1).act, ATAC)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet50_has_the_published_parameters(library):
    from convette.models import create_model

    model = create_model(f"{library}:resnet50", num_classes=1000, seed=0)
    assert count(model) == 25_557_032
    replace_activation(model, torch.randn(1, 3, 32, 32))
    assert count(model) == 27_934_760
    block = model.layer4[1]
    assert isinstance(block.act1, ATAC) and isinstance(block.act2, ATAC)
    assert isinstance(block, ATACBottleneck) if library == "torchvision" else isinstance(block.act3, nn.ReLU)
    assert not any(isinstance(m, ATAC) for m in model.layer2.modules())


def eval_unit(c=6, **arguments):
    torch.manual_seed(0)
    unit = ATAC(c, **arguments)
    for _ in range(3):
        unit(torch.randn(4, c, 5, 5) * 2 + 1)
    return unit.eval()


def test_it_looks_at_one_position_only():
    unit, x = eval_unit(), torch.randn(2, 6, 4, 3)
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(unit(shuffled), unit(x).flatten(2)[..., order].view_as(x))
    other = x.clone()
    other[..., 1, 1] += 5
    changed = (unit(other) != unit(x)).any(1)
    assert changed[:, 1, 1].all() and int(changed.sum()) == 2
    gate = eval_unit(use_global=True).gate(x)
    assert gate.shape == (2, 6, 1, 1)


def test_it_shrinks_and_keeps_the_sign():
    unit, x = eval_unit(), torch.randn(2, 6, 4, 3)
    y = unit(x)
    assert bool((y.abs() <= x.abs()).all()) and torch.equal(y.sign(), x.sign())
    assert torch.equal(unit(torch.zeros_like(x)), torch.zeros_like(x))


def test_limits_of_the_gate():
    unit, x = eval_unit(), torch.randn(2, 6, 4, 3)
    with torch.no_grad():
        unit.expand.weight.zero_()
        unit.norm2.running_mean.zero_()
        for shift, expected in ((0.0, x / 2), (40.0, x), (-40.0, torch.zeros_like(x))):
            unit.norm2.bias.fill_(shift)
            torch.testing.assert_close(unit(x), expected, atol=1e-6, rtol=0)


def test_a_gate_of_large_gain_is_relu():
    unit = ATAC(2, 1, use_relu=False).eval()
    with torch.no_grad():
        unit.reduce.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        unit.expand.weight.copy_(1e4 * torch.eye(2).view(2, 2, 1, 1))
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(unit(x), x.relu(), atol=1e-4, rtol=0)


def test_gradients_and_folds():
    from convette.surgery import fold

    unit = ATAC(3).double().train()
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: unit(x), (x, *unit.parameters()))
    unit = eval_unit()
    x = torch.randn(2, 6, 4, 3)
    folded = fold(nn.Sequential(unit), x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), unit(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(Stays, match="gate"):
        unit.folded()


@pytest.mark.parametrize(
    ("name", "stage_count", "units"),
    [
        ("resnet20", None, 9),
        ("torchvision:resnet18", 2, 4),
        ("timm:resnet18", 2, 4),
        ("mobilenet_v2", 2, 23),
        ("timm:efficientnet_b0", 1, 2),
    ],
)
def test_in_networks_it_is_logged_and_carries_weights_over(name, stage_count, units, tmp_path):
    from convette.models import create_model, load, save

    model = create_model(name, num_classes=3, seed=0)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    replace_activation(model, x, stage_count)
    assert sum(isinstance(m, ATAC) for m in model.modules()) == units
    kept = model.state_dict()
    same = [key for key in weights if key in kept and torch.equal(kept[key], weights[key])]
    assert len(same) == len(weights) or not name.startswith(("timm", "torchvision"))
    assert len(same) >= 0.9 * len(weights)
    save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))


def test_a_rebuilt_block_is_the_old_one_but_for_its_gate():
    """With gates that do what ReLU does, the network is the one it was."""
    from convette.models import create_model

    class Relu(nn.Module):
        def forward(self, x):
            return x.relu()

    for name in ("resnet20", "torchvision:resnet18", "torchvision:resnext50_32x4d"):
        model = create_model(name, num_classes=3, seed=0).eval()
        x = torch.randn(1, 3, 32, 32)
        expected = model(x)
        replace_activation(model, stage_count=3)
        for block in model.modules():
            for act in ("act1", "act2"):
                if isinstance(getattr(block, act, None), ATAC):
                    setattr(block, act, Relu())
        torch.testing.assert_close(model(x), expected)


def test_refusals():
    with pytest.raises(UsageError, match="example"):
        replace_activation(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), stage_count=None)
    with pytest.raises(UsageError, match="no activation"):
        replace_activation(nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(2, 1, 2, 2), None)
    with pytest.raises(UsageError, match="at least 2"):
        ATAC(3, use_global=True)(torch.randn(1, 3, 4, 4))
    with pytest.raises(UsageError, match="act_layers"):
        ATACResNet(1, act_layers=5)
    assert ATAC(1).reduce.out_channels == 1
