"""MixStyle: statistics it mixes, gradients it leaves, partners, draws, contexts, the semi-supervised loss."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import (
    DomainSampler,
    MixStyle,
    insert_mixstyle,
    mix_style,
    run_with_mixstyle,
    run_without_mixstyle,
    semi_mixstyle_loss,
)


def images(count=6, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(count, 3, 5, 5) * (torch.rand(count, 3, 1, 1) + 0.5) + torch.randn(count, 3, 1, 1)).to(dtype)


def statistics(x):
    var, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return mean, (var + 1e-6).sqrt()


def test_identity_where_it_should_be():
    x = images()
    assert MixStyle(p=1.0).eval()(x) is x and MixStyle(p=0.0).train()(x) is x
    torch.testing.assert_close(MixStyle(p=1.0).train()(x[:1]), x[:1], atol=1e-5, rtol=1e-5)
    layer = MixStyle(p=1.0)
    assert not list(layer.parameters()) and not layer.state_dict() and isinstance(layer.folded(), nn.Identity)


def test_lam_1_keeps_and_lam_0_swaps():
    x, order = images(), torch.tensor([3, 4, 5, 0, 1, 2])
    one, zero = torch.ones(6, 1, 1, 1), torch.zeros(6, 1, 1, 1)
    torch.testing.assert_close(mix_style(x, order, one), x, atol=1e-5, rtol=1e-5)
    for found, expected in zip(statistics(mix_style(x, order, zero)), statistics(x[order]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_statistics_are_mixed_and_content_stays():
    x, order, lam = images(), torch.tensor([1, 2, 3, 4, 5, 0]), torch.rand(6, 1, 1, 1, dtype=torch.float64)
    y = mix_style(x, order, lam)
    mean, deviation = statistics(x)
    mixed_mean = lam * mean + (1 - lam) * mean[order]
    mixed_deviation = lam * deviation + (1 - lam) * deviation[order]
    torch.testing.assert_close(y.mean((2, 3), keepdim=True), mixed_mean)
    var = x.var((2, 3), keepdim=True)
    torch.testing.assert_close(y.std((2, 3), keepdim=True), mixed_deviation * (var / (var + 1e-6)).sqrt())

    def content(z):
        var, mean = torch.var_mean(z, (2, 3), keepdim=True)
        return (z - mean) / var.sqrt()

    torch.testing.assert_close(content(y), content(x), atol=1e-4, rtol=1e-4)


def test_the_gradient_is_diagonal():
    x, order, lam = images().requires_grad_(), torch.tensor([1, 0, 3, 2, 5, 4]), torch.full((6, 1, 1, 1), 0.3)
    y = mix_style(x, order, lam)
    y.sum().backward()
    _, deviation = statistics(x.detach())
    expected = (0.3 * deviation + 0.7 * deviation[order]) / deviation
    torch.testing.assert_close(x.grad, expected.expand_as(x), atol=1e-7, rtol=1e-6)


def test_partners():
    torch.manual_seed(1)
    layer = MixStyle(mix="crossdomain")
    for _ in range(20):
        order = layer.partners(8)
        assert sorted(order.tolist()) == list(range(8))
        assert bool((order[:4] >= 4).all()) and bool((order[4:] < 4).all())
    with pytest.raises(UsageError, match="7 images"):
        layer.partners(7)
    assert sorted(MixStyle().partners(7).tolist()) == list(range(7))


def test_draws():
    torch.manual_seed(2)
    x = images(2, torch.float32)[:, :1, :2, :2]
    layer = MixStyle(p=0.5, alpha=0.1).train()
    active = sum(layer(x) is not x for _ in range(10_000)) / 10_000
    assert active == pytest.approx(0.5, abs=0.02)
    lam = torch.distributions.Beta(0.1, 0.1).sample((100_000,))
    assert float(((lam < 0.05) | (lam > 0.95)).float().mean()) == pytest.approx(0.76, abs=0.02)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.layer2 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def test_inserting_keeps_names_and_inference():
    torch.manual_seed(3)
    model = Net().eval()
    x = images(4, torch.float32)
    expected, keys = model(x), [key for key in model.state_dict() if "layer1" in key]
    insert_mixstyle(model, ("layer1", "layer2"), MixStyle(p=1.0))
    assert torch.equal(model(x), expected) and all(key in model.state_dict() for key in keys)
    assert model.layer1[2] is model.layer2[1]
    model.train()
    with run_without_mixstyle(model):
        assert torch.equal(model(x), expected)
        with run_with_mixstyle(model, "crossdomain"):
            assert model.layer1[2].active and model.layer1[2].mix == "crossdomain"
    assert model.layer1[2].active and model.layer1[2].mix == "random"
    with pytest.raises(UsageError, match="layer9"):
        insert_mixstyle(model, ("layer9",))


def test_domain_sampler_pairs_two_domains():
    domains = [0] * 10 + [1] * 7 + [2] * 30
    sampler = DomainSampler(domains, 8, seed=4)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 47 // 8
    for batch in batches:
        kinds = [domains[index] for index in batch]
        assert len(set(kinds[:4])) == len(set(kinds[4:])) == 1 and kinds[0] != kinds[4]
    assert batches != list(sampler) and batches == list(DomainSampler(domains, 8, seed=4))
    for wrong in ((domains, 7), ([0, 0, 0], 2)):
        with pytest.raises(UsageError):
            DomainSampler(*wrong)


def test_semi_supervised_loss():
    torch.manual_seed(5)
    model = insert_mixstyle(Net(), ("layer1",), MixStyle(p=1.0)).train()
    views = [images(4, torch.float32) for _ in range(4)]
    labels = torch.tensor([0, 1, 2, 0])
    supervised, none = semi_mixstyle_loss(model, (views[0], views[1]), labels, (views[2], views[3]), threshold=1.01)
    assert float(none) == 0
    with run_without_mixstyle(model):
        torch.testing.assert_close(supervised, nn.functional.cross_entropy(model(views[0]), labels))
    _, some = semi_mixstyle_loss(model, (views[0], views[1]), labels, (views[2], views[3]), threshold=0.0, weight=2.0)
    assert float(some.detach()) > 0 and some.requires_grad
    with pytest.raises(UsageError, match="as many"):
        semi_mixstyle_loss(model, (views[0], views[1]), labels, (views[2][:2], views[3][:2]))


def test_refusals():
    for options in ({"p": 1.5}, {"alpha": 0.0}):
        with pytest.raises(UsageError):
            MixStyle(**options)
    with pytest.raises(UsageError, match="1x1"):
        MixStyle(p=1.0).train()(torch.randn(4, 3, 1, 1))
