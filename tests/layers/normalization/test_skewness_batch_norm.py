"""BNSR: the power map, the skewness it leaves, invariances, restandardising, annealing."""

import copy

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.normalization import SkewReducedBatchNorm2d, anneal_to_bn, signed_power, skewness, skewness_report


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
def test_the_map_is_odd_increasing_and_fixes_one(p, smoothing):
    h = torch.linspace(-5, 5, 401, dtype=torch.float64)
    y = signed_power(h, p, smoothing)
    torch.testing.assert_close(y, -signed_power(-h, p, smoothing))
    assert bool((y.diff() > 0).all())
    ends = signed_power(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), p, smoothing)
    torch.testing.assert_close(ends, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-12, rtol=0)
    if p == 1:
        torch.testing.assert_close(y, h, atol=1e-12, rtol=0)


def test_gradient_at_zero():
    h = torch.tensor([-0.7, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    p = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, p: signed_power(h, p, 0.05), (h, p))
    signed_power(h, 0.9).sum().backward()
    assert float(h.grad[1]) == pytest.approx(1.24, abs=0.01)


def samples(kind):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    values = {
        "exponential": lambda: -torch.rand(2_000_000, generator=generator, dtype=torch.float64).log(),
        "lognormal": lambda: (0.5 * normal).exp(),
        "rectified": lambda: normal.relu(),
        "gaussian": lambda: normal,
    }[kind]()
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("exponential", 2.00, {0.9: 1.64, 0.8: 1.35, 0.7: 1.11, 0.5: 0.79, 1.1: 2.42}),
        ("lognormal", 1.75, {0.9: 1.39, 0.8: 1.10, 0.7: 0.88, 0.5: 0.60}),
        ("rectified", 1.64, {0.9: 1.43, 0.8: 1.25, 0.7: 1.10, 0.5: 0.86}),
    ],
)
def test_skewness_before_and_after(kind, before, after):
    h = samples(kind)
    assert float(skewness(h[:, None])[0]) == pytest.approx(before, abs=0.03)
    for p, expected in after.items():
        assert float(skewness(signed_power(h, p, 0.0)[:, None])[0]) == pytest.approx(expected, abs=0.03), p


def test_gaussian_stays_symmetric_with_the_known_variance():
    h = samples("gaussian")
    for p, variance in ((0.9, 0.933), (0.8, 0.880), (0.7, 0.840)):
        y = signed_power(h, p, 0.0)
        assert float(skewness(y[:, None])[0]) == pytest.approx(0, abs=0.01)
        assert float(y.var()) == pytest.approx(variance, abs=0.003)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_p_1_is_batch_norm(smoothing):
    torch.manual_seed(0)
    layer, plain = SkewReducedBatchNorm2d(4, 1.0, smoothing=smoothing), nn.BatchNorm2d(4)
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5) + 2
        torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), atol=1e-6, rtol=1e-5)


def test_scale_and_sign_of_channels():
    torch.manual_seed(1)
    layer = SkewReducedBatchNorm2d(3, 0.7).double().train()
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64).exp()
    y = layer(x)
    torch.testing.assert_close(layer(5 * x - 7), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(-5 * x), -y, atol=1e-4, rtol=1e-4)


def test_gradcheck_of_the_layer():
    torch.manual_seed(2)
    layer = SkewReducedBatchNorm2d(2, 0.8, learned=True).double().train()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_restandardised_outputs_have_variance_1():
    torch.manual_seed(3)
    y = SkewReducedBatchNorm2d(3, 0.7, restandardize=True).train()(torch.randn(16, 3, 8, 8).exp())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_adaptive_bends_the_long_side_only_after_the_warm_up():
    torch.manual_seed(4)
    layer = SkewReducedBatchNorm2d(1, 0.7, mode="adaptive").train()
    x = torch.randn(32, 1, 8, 8).exp()
    for _ in range(60):
        y = layer(x)
    h = nn.BatchNorm2d(1, affine=False)(x)
    assert float(layer.running_skewness) > 1
    low, high = h < 0, h > 0
    torch.testing.assert_close(y[low], h[low], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[high], signed_power(h[high], 0.7), atol=1e-4, rtol=1e-4)
    both = SkewReducedBatchNorm2d(1, 0.7).train()(x)
    assert max(abs(float(skewness(y))), abs(float(skewness(both)))) < 0.8 * abs(float(skewness(x)))


def test_learned_exponents_start_where_they_should():
    layer = SkewReducedBatchNorm2d(3, 0.9, learned=True)
    torch.testing.assert_close(layer.powers(), torch.full((3,), 0.9))
    assert float(torch.sigmoid(layer.exponents[0])) == pytest.approx(0.8)


@pytest.mark.parametrize("learned", [False, True])
def test_annealing_ends_in_batch_norm(learned):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), SkewReducedBatchNorm2d(4, 0.8, learned=learned))
    x = torch.randn(8, 2, 8, 8)
    model(x)
    with pytest.raises(Stays, match="anneal_to_bn"):
        model[1].folded()
    anneal_to_bn(model, 0.5)
    torch.testing.assert_close(model[1].powers().detach(), torch.full((4,), 0.9))
    anneal_to_bn(model, 1.0)
    model.eval()
    plain = copy.deepcopy(model)
    plain[1] = model[1].folded()
    assert type(plain[1]) is nn.BatchNorm2d
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


def test_report_says_that_skewness_fell():
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        SkewReducedBatchNorm2d(8, 0.8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        SkewReducedBatchNorm2d(8, 0.8),
        nn.BatchNorm2d(8),
    )
    batches = [torch.randn(16, 1, 12, 12).exp() for _ in range(2)]
    for batch in batches:
        model(batch)
    modes = [module.training for module in model.modules()]
    report = skewness_report(model, batches)
    assert set(report) == {"1", "4", "5"} and modes == [module.training for module in model.modules()]
    assert report["1"].output < 0.9 * report["1"].standardised
    assert report["5"].output == pytest.approx(report["5"].standardised, rel=1e-3)


def test_refusals():
    for options in ({"p": 1.01}, {"p": 0.0}, {"p": float("nan")}, {"smoothing": 0.5}, {"p": 0.4, "learned": True}):
        with pytest.raises(UsageError):
            SkewReducedBatchNorm2d(3, **options)
    SkewReducedBatchNorm2d(3, 1.01, allow_expand=True)
    with pytest.raises(UsageError, match="fraction"):
        anneal_to_bn(nn.Sequential(), 1.5)
