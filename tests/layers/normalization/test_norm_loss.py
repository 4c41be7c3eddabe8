"""Norm loss: values, its gradient and dynamics, the decoupled step, what it acts on."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import NormLoss, NormLossWarning, WAConv2d, norm_loss, weight_align


def linear(*norms):
    layer = nn.Linear(4, len(norms), bias=False).double()
    with torch.no_grad():
        weight = torch.randn(len(norms), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        layer.weight.copy_(
            weight / weight.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=torch.float64)[:, None]
        )
    return layer


@pytest.mark.parametrize(("norm", "value"), [(3.0, 4.0), (0.5, 0.25), (1.0, 0.0), (0.0, 1.0)])
def test_values(norm, value):
    assert float(norm_loss(linear(norm)).detach()) == pytest.approx(value, abs=1e-12)
    assert float(norm_loss(nn.Sequential(linear(norm, norm), linear(norm))).detach()) == pytest.approx(
        3 * value, abs=1e-12
    )


def test_the_gradient_is_along_the_filter():
    layer = linear(3.0, 0.5, 1.0, 0.0)
    norm_loss(layer).backward()
    weight, gradient = layer.weight.detach(), layer.weight.grad
    norms = weight.norm(dim=1, keepdim=True)
    expected = torch.where(norms > 0, 2 * (1 - 1 / norms.clamp_min(1e-12)) * weight, 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)
    assert float(gradient[2].abs().max()) < 1e-12 and bool(torch.isfinite(gradient).all())


def test_dynamics_and_the_decoupled_step_are_the_same():
    plain, decoupled = linear(2.0, 0.2), linear(2.0, 0.2)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    loss, step = NormLoss(plain, 0.01), NormLoss(decoupled, 0.01)
    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        step.step(0.1)
    torch.testing.assert_close(
        plain.weight.norm(dim=1) - 1, 0.1351 * torch.tensor([1.0, -0.8]).double(), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(decoupled.weight, plain.weight, atol=1e-6, rtol=1e-6)


def test_filters_of_every_kind_of_layer():
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 4, 2),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Linear(3, 2),
    ]
    weights = [layer.weight.detach() for layer in layers]
    norms = [
        weights[0].flatten(1).norm(dim=1),
        weights[1].flatten(1).norm(dim=1),
        weights[2].transpose(0, 1).flatten(1).norm(dim=1),
        torch.cat([part.transpose(0, 1).flatten(1).norm(dim=1) for part in weights[3].chunk(2)]),
        weights[4].norm(dim=1),
    ]
    expected = torch.cat([(1 - one).square() for one in norms]).sum()
    model = nn.Sequential(*layers, nn.BatchNorm2d(4))
    torch.testing.assert_close(norm_loss(model).detach(), expected)
    NormLoss(model, 0.5).step(1.0)  # lr 1, lambda 1/2: all norms are 1 in one step
    assert float(norm_loss(model).detach()) < 1e-9


def test_permutation_and_rotation():
    layer = linear(3.0, 0.5, 1.7)
    before = float(norm_loss(layer).detach())
    with torch.no_grad():
        rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
        layer.weight.copy_(layer.weight[[2, 0, 1]] @ rotation)
    assert float(norm_loss(layer).detach()) == pytest.approx(before)


def test_what_it_leaves_out():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), WAConv2d(4, 4, 3), weight_align(nn.Sequential(nn.Conv2d(4, 4, 3))), nn.Linear(4, 2)
    )
    with pytest.warns(NormLossWarning, match="2 layers"):
        loss = NormLoss(model, exclude=("3",))
    assert set(loss.layers) == {"0"} and set(loss.report()) == {"0"}
    with pytest.raises(UsageError, match="'fc'"):
        NormLoss(model, exclude=("fc",))
    with pytest.raises(UsageError, match="no convolution"):
        norm_loss(nn.Sequential(nn.ReLU()))
    with pytest.raises(UsageError, match="weight"):
        NormLoss(model, -1.0)


def test_training_moves_norms_towards_one():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    loss = NormLoss(model, 1e-2)

    def distance():
        return sum(abs(one.mean - 1) for one in loss.report().values())

    start = distance()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        x, labels = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), labels) + loss()).backward()
        optimizer.step()
    assert distance() < start


def test_half_precision_norms_are_single():
    layer = nn.Linear(4096, 1, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1 / 64)
    assert norm_loss(layer).dtype == torch.float32 and float(norm_loss(layer).detach()) < 1e-6
