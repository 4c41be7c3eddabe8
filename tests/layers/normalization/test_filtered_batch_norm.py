"""Filtered batch norm: what is left out, robustness, limiting cases, equality with batch norm at inference."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import (
    FilteredBatchNorm1d,
    FilteredBatchNorm2d,
    PooledFilteredBatchNorm1d,
    filter_batch_norm,
    filtered_moments,
    outlier_report,
)
from convette.layers.normalization.filtered_batch_norm import inliers, truncated_variance


def test_without_a_threshold_it_is_batch_norm():
    torch.manual_seed(0)
    layer, plain = FilteredBatchNorm2d(3, threshold=math.inf), nn.BatchNorm2d(3)
    for momentum in (0.1, None):
        layer.momentum = plain.momentum = momentum
        for _ in range(3):
            x = torch.randn(8, 3, 5, 5) * 2 + 1
            torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(1, 5), power=st.integers(1, 5))
def test_chebyshev_and_smaller_variance(seed, threshold, power):
    x = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** power
    left_out = 1 - inliers(x, threshold).double().mean((0, 2, 3))
    assert float(left_out.max()) <= 1 / threshold**2
    moments, count = filtered_moments(x, threshold)
    assert float(count.min()) >= 1
    assert bool((moments.var <= x.var((0, 2, 3), keepdim=True) * (1 + 1e-9)).all())


def test_gaussian_fractions_and_variances():
    x = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    for threshold, fraction, variance in ((2.0, 4.55e-2, 0.774), (3.0, 2.7e-3, 0.973), (4.0, 6.3e-5, 0.9989)):
        assert float(1 - inliers(x, threshold).float().mean()) == pytest.approx(fraction, rel=0.35)
        moments, _ = filtered_moments(x, threshold)
        assert float(moments.var) == pytest.approx(variance, abs=0.005)
        assert truncated_variance(threshold) == pytest.approx(variance, abs=6e-4)
    assert truncated_variance(math.inf) == 1


def test_seventeen_values_keep_all_and_eighteen_lose_the_outlier():
    for count, kept in ((17, 17), (18, 17)):
        x = 1e-6 * torch.randn(count, 1, dtype=torch.float64)
        x[0] = 100
        assert int(inliers(x, 4.0, 0.0).sum()) == kept


def test_one_outlier_does_not_move_the_statistics():
    torch.manual_seed(1)
    x = torch.randn(4097, 1)
    x[7] = 1e4
    assert float(x.var()) > 2e4
    moments, count = filtered_moments(x, 4.0)
    assert float(moments.var) == pytest.approx(1, abs=0.05) and float(moments.mean) == pytest.approx(0, abs=0.05)
    assert int(count) <= 4096
    y = FilteredBatchNorm1d(1).train()(x)
    assert float(y[7]) == pytest.approx(1e4, rel=0.05)  # not clipped
    infinite = x.clone()
    infinite[7] = float("inf")
    assert not bool(torch.isfinite(FilteredBatchNorm1d(1).train()(infinite)).all())


def test_affine_changes_leave_the_mask():
    torch.manual_seed(2)
    x = torch.randn(32, 3, 4, 4, dtype=torch.float64) ** 3
    layer = FilteredBatchNorm2d(3, threshold=2.0).double().train()
    for a in (4.0, -4.0):
        assert torch.equal(inliers(a * x + 3, 2.0, 0.0), inliers(x, 2.0, 0.0))
    torch.testing.assert_close(layer(4 * x + 3), layer(x), atol=1e-4, rtol=1e-4)


def test_gradients():
    torch.manual_seed(3)
    x = torch.randn(12, 2, 1, 1, dtype=torch.float64)
    x[0, 0], x[3, 1] = 9.0, -8.0
    x.requires_grad_()
    layer = FilteredBatchNorm2d(2, threshold=2.5).double().train()
    assert int((~inliers(x, 2.5)).sum()) == 2
    assert torch.autograd.gradcheck(layer, (x,))
    moments, _ = filtered_moments(x, 2.5)
    (moments.mean.sum() + moments.var.sum()).backward()
    assert float(x.grad[0, 0]) == 0 and float(x.grad[3, 1]) == 0 and float(x.grad[1, 0]) != 0


def test_more_iterations_leave_out_more():
    torch.manual_seed(4)
    x = torch.randn(4096, 1)
    x[:20] = 1e3
    x[20:40] = 20.0  # hidden by the others at first
    counts = [int(filtered_moments(x, 4.0, iterations=number)[1]) for number in (1, 2, 4)]
    assert counts[0] > counts[1] >= counts[2] and float(filtered_moments(x, 4.0, iterations=3)[0].var) < 1.1


def test_one_sided_leaves_out_large_values_only():
    x = torch.cat([torch.zeros(500, 1), torch.full((1, 1), -50.0), torch.full((1, 1), 50.0)])
    inside = inliers(x, 4.0, one_sided=True)
    assert bool(inside[500]) and not bool(inside[501])


def test_replaced_batch_norms_keep_what_they_learned():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6))
    x = torch.randn(8, 2, 8, 8)
    model(x)
    model.eval()
    expected, state = model(x), copy.deepcopy(model.state_dict())
    filter_batch_norm(model, 3.0)
    assert isinstance(model[1], FilteredBatchNorm2d) and isinstance(model[4], FilteredBatchNorm1d)
    assert torch.equal(model(x), expected) and set(model.state_dict()) == set(state)
    assert type(model[1].folded()) is nn.BatchNorm2d and torch.equal(
        model[1].folded()(model[0](x)), model[1](model[0](x))
    )


def test_surgery_folds_it_into_the_convolution():
    from convette.surgery import fold

    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), FilteredBatchNorm2d(4), nn.ReLU())
    x = torch.randn(8, 2, 8, 8)
    model(x)
    folded = fold(model.eval(), x)
    assert not any(isinstance(module, FilteredBatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_pooled_form_has_one_mean_for_all_features():
    torch.manual_seed(7)
    x = torch.randn(64, 10) * 3 + 2
    layer = PooledFilteredBatchNorm1d(10).train()
    y = layer(x)
    assert float(y.mean()) == pytest.approx(0, abs=1e-5) and sum(p.numel() for p in layer.parameters()) == 2
    layer.eval()
    torch.testing.assert_close(layer.folded()(x), layer(x), atol=1e-6, rtol=1e-5)


def test_report():
    torch.manual_seed(8)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), FilteredBatchNorm2d(2))
    x = torch.randn(16, 2, 8, 8)
    x[0, 0, 0, 0] = 1e3
    report = outlier_report(model, [x, x], 4.0)
    assert report["0"] == pytest.approx(1 / x.numel(), rel=0.01) and set(report) == {"0", "2"}
    with pytest.raises(UsageError):
        outlier_report(nn.Sequential(nn.ReLU()), [x])


def test_refusals():
    for options in ({"threshold": 0.5}, {"threshold": float("nan")}, {"iterations": 0}):
        with pytest.raises(UsageError):
            FilteredBatchNorm2d(3, **options)
