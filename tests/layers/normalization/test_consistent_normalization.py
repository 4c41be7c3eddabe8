"""Consistent normalization: Fixup starts, statistics of clean halves, the gap, the transform, folding."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers import Stays, fold_layers
from convette.layers.normalization import (
    ConsistentBatchNorm2d,
    ConsistentUnit,
    SparseSwitchNorm2d,
    consistency_gap,
    single_stream,
    to_consistent,
    unit_scalars,
)


def unit(norm, channels=4, **options):
    convs = [nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.Conv2d(6, channels, 3, padding=1, bias=False)]
    return ConsistentUnit(convs, norm, **options)


def test_a_unit_starts_as_normalised_identity():
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    torch.testing.assert_close(unit(nn.BatchNorm2d(4))(x), nn.BatchNorm2d(4)(x).relu(), atol=1e-6, rtol=1e-6)
    assert torch.equal(unit(nn.Identity())(x), x.relu())
    assert torch.equal(unit(nn.BatchNorm2d(4), pre_activation=True)(x), x)


def test_fixup_scale():
    torch.manual_seed(1)
    convs = [nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)]
    made = ConsistentUnit(convs, nn.BatchNorm2d(64), units=16)
    expected = math.sqrt(2 / (9 * 64)) * 16 ** (-1 / 4)
    assert float(made.convs[1].weight.std()) == pytest.approx(expected, rel=0.02)
    assert float(made.convs[2].weight.abs().max()) == 0
    assert len(unit_scalars(made)) == 2 * 3 + 1 and sum(p.numel() for p in unit_scalars(made)) == 7


def test_clean_statistics_keep_mixtures_and_joint_ones_shrink():
    torch.manual_seed(2)
    norm = ConsistentBatchNorm2d(3, stats="clean").double().train()
    a = torch.randn(64, 3, 5, 5, dtype=torch.float64) * 2 + 1
    b = a.roll(1, 0)
    lam = torch.rand(64, 1, 1, 1, dtype=torch.float64)
    fixed = 0.3
    whole = {
        name: norm(torch.cat([a, part]))[64:]
        for name, part in (("a", a), ("b", b), ("mix", fixed * a + (1 - fixed) * b))
    }
    torch.testing.assert_close(whole["mix"], fixed * whole["a"] + (1 - fixed) * whole["b"], atol=1e-12, rtol=0)
    running = norm.running_mean.clone()
    norm(torch.cat([a, 100 + b]))
    assert float((norm.running_mean - a.mean((0, 2, 3))).abs().max()) <= float(
        (running - a.mean((0, 2, 3))).abs().max()
    )
    mixes = lam * a + (1 - lam) * b
    ratio = mixes.var((0, 2, 3)) / a.var((0, 2, 3))
    independent = torch.randn(4000, 3, 5, 5)
    lam = torch.rand(4000, 1, 1, 1)
    mixed = lam * independent + (1 - lam) * independent.roll(1, 0)
    shrunk = mixed.var((0, 2, 3)) / independent.var((0, 2, 3))
    torch.testing.assert_close(shrunk, torch.full((3,), 2 / 3), atol=0, rtol=0.05)
    assert bool((ratio < 1).all())


def test_gradients_flow_through_clean_statistics():
    torch.manual_seed(3)
    norm = ConsistentBatchNorm2d(2, stats="clean").double().train()
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    norm(x)[2:].square().sum().backward()
    assert float(x.grad[:2].abs().max()) > 0


def test_joint_and_single_stream_are_batch_norm():
    torch.manual_seed(4)
    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(ConsistentBatchNorm2d(3)(x), nn.BatchNorm2d(3)(x))
    layer = ConsistentBatchNorm2d(3, stats="clean").train()
    with single_stream(nn.Sequential(layer)):
        assert torch.equal(layer(x[:5]), nn.BatchNorm2d(3)(x[:5]))
    with pytest.raises(UsageError, match="halves"):
        layer(x[:5])


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))

    def forward(self, x):
        return self.body(x)


def test_the_gap():
    torch.manual_seed(6)
    x = torch.randn(64, 3, 8, 8)
    model = Norms()
    assert consistency_gap(model, x, x).mean == 0
    gap = consistency_gap(model, x, 2 * x + 1)
    assert set(gap.layers) == {"body.0", "body.2"} and gap.mean > 0.1
    # (1/1)² + log(2)² for the first layer's input
    assert gap.layers["body.0"] == pytest.approx(1 + math.log(2) ** 2, rel=0.05)
    scaled = consistency_gap(nn.Sequential(nn.BatchNorm2d(3)), 5 * x, 5 * (2 * x + 1))
    assert scaled.mean == pytest.approx(gap.layers["body.0"], rel=1e-3)
    with pytest.raises(UsageError, match="no normaliser"):
        consistency_gap(nn.ReLU(), x, x)


def moved(norm):
    """A consistent ResNet-20 with its parameters moved a little and statistics of one batch, and that batch."""
    from convette.models import resnet20

    torch.manual_seed(7)
    model = to_consistent(resnet20(), norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(4, 3, 16, 16)
    model.train()(x)
    return model.eval(), x


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "switchable"])
def test_eval_is_independent_of_the_batch(norm):
    model, x = moved(norm)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-4, rtol=1e-4)
    kinds = {"batch": ConsistentBatchNorm2d, "switchable": SparseSwitchNorm2d}
    assert sum(isinstance(m, kinds.get(norm, nn.GroupNorm)) for m in model.modules()) == 9


@pytest.mark.parametrize("identity", [True, False])
def test_folded_units_are_equal(identity):
    torch.manual_seed(8)
    made = unit(ConsistentBatchNorm2d(4), shortcut=None if identity else nn.Conv2d(4, 4, 1, bias=False))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(8, 4, 6, 6)
    for _ in range(3):
        made.train()(x)
    made.eval()
    folded = made.folded()
    torch.testing.assert_close(folded(x), made(x), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert (folded.factor is None) is not identity
    with pytest.raises(Stays, match="GroupNorm"):
        unit(nn.GroupNorm(2, 4)).folded()


def test_whole_networks_fold():
    model, x = moved("batch")
    result = fold_layers(model)
    assert len(result.folded) == 9 and not result.kept
    torch.testing.assert_close(result.model(x), model(x), atol=1e-4, rtol=1e-4)


def test_the_network_starts_at_chance_and_learns():
    from convette.models import create_model

    torch.manual_seed(10)
    model = to_consistent(create_model("resnet20", num_classes=7, seed=0)).train()
    x, labels = torch.randn(16, 3, 16, 16), torch.randint(7, (16,))
    logits = model(x)
    assert float(logits.detach().abs().max()) == 0
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        loss = functional.cross_entropy(model(x), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(7), abs=1e-6) and losses[1] < losses[0]
    first = model.layer1[0].convs[0].weight
    assert first.grad is not None and float(first.grad.abs().max()) > 0  # after the last convolution has moved


def test_resnet50_has_17_normalisers():
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
        before = sum(p.numel() for p in model.parameters())
        channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        to_consistent(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 17
    dropped = channels - sum(m.num_features for m in norms)
    assert sum(p.numel() for p in model.parameters()) == before - 2 * dropped + 7 * 16


def test_clean_mode_reaches_the_stem_and_refusals():
    from convette.models import resnet20

    model = to_consistent(resnet20(), stats="clean")
    assert isinstance(model.bn1, ConsistentBatchNorm2d) and model.bn1.stats == "clean"
    copy.deepcopy(model).train()(torch.randn(4, 3, 16, 16))
    with pytest.raises(UsageError, match="norm 'batch'"):
        to_consistent(resnet20(), "group", "clean")
    with pytest.raises(UsageError, match="no residual blocks"):
        to_consistent(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(UsageError, match="convolutions"):
        ConsistentUnit([nn.Conv2d(2, 2, 1)], nn.Identity())
