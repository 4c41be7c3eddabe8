"""SSN: SparsestMax against computed values, one-hot layers against the normalisers they are, freezing, collapse."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.normalization import (
    RadiusSchedule,
    SparseSwitchNorm2d,
    TwoMomentNorm2d,
    collapse,
    ratio_parameters,
    sparsemax,
    sparsestmax,
)

LOGITS = st.lists(st.floats(-2, 2), min_size=2, max_size=6)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("z", "r", "expected"),
    [
        ((0.5, 0.3, 0.2), 0.1, (0.5, 0.3, 0.2)),
        ((0.5, 0.3, 0.2), 0.2, (0.5, 0.3, 0.2)),
        ((0.5, 0.3, 0.2), 0.3, (0.5648, 0.2870, 0.1482)),
        ((0.5, 0.3, 0.2), 0.5, (0.7191, 0.2562, 0.0247)),
        ((0.5, 0.3, 0.2), 0.6, (0.8109, 0.1891, 0)),
        ((0.5, 0.3, 0.2), 0.8, (0.9865, 0.0135, 0)),
        ((0.5, 0.3, 0.2), math.sqrt(2 / 3), (1, 0, 0)),
        ((0.8, 0.6, 0.1), 0.0, (0.6, 0.4, 0)),
        ((0.8, 0.6, 0.1), 0.3, (0.7121, 0.2879, 0)),
        ((0.8, 0.6, 0.1), 0.8, (1, 0, 0)),
    ],
)
def test_computed_values(z, r, expected):
    torch.testing.assert_close(sparsestmax(tensor(*z), r), tensor(*expected), atol=6e-5, rtol=0)


@settings(max_examples=80, deadline=None)
@given(z=LOGITS, r=st.floats(0, 1), shift=st.floats(-3, 3), seed=st.integers(0, 99))
@example(z=[0.0, 1e-9], r=0.5, shift=0.0, seed=0)
def test_it_stays_on_the_simplex_in_order(z, r, shift, seed):
    z = tensor(*z)
    p = sparsestmax(z, r)
    assert float(p.sum()) == pytest.approx(1, abs=1e-9) and float(p.min()) >= 0
    order = z.argsort(stable=True)
    assert bool((p[order].diff() >= -1e-9).all())
    torch.testing.assert_close(sparsestmax(z + shift, r), p, atol=1e-6, rtol=0)
    torch.testing.assert_close(sparsestmax(z, 0.0), sparsemax(z), atol=0, rtol=0)
    ordered = z.sort(descending=True).values
    if float(ordered[0] - ordered[1]) > 1e-3:
        mix = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sparsestmax(z[mix], r), p[mix], atol=1e-6, rtol=0)
        largest = math.sqrt((len(z) - 1) / len(z))
        one_hot = sparsestmax(z, largest + 1e-9)
        assert float(one_hot[z.argmax()]) == pytest.approx(1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(z=st.lists(st.integers(-100, 100), min_size=3, max_size=3, unique=True))
def test_a_larger_radius_is_sparser_and_farther_from_the_centre(z):
    z = tensor(*z) / 100
    radii = torch.linspace(0, 1, 21, dtype=torch.float64)
    found = [sparsestmax(z, float(r)) for r in radii]
    sizes = [int((p > 1e-9).sum()) for p in found]
    assert sizes == sorted(sizes, reverse=True)
    for r, p in zip(radii, found, strict=True):
        distance = float((p - 1 / 3).norm())
        assert distance >= min(float(r), math.sqrt(2 / 3)) - 1e-6


def test_ties_give_the_centre_and_finite_gradients():
    z = torch.ones(3, requires_grad=True)
    p = sparsestmax(z, 0.5)
    torch.testing.assert_close(p, torch.full((3,), 1 / 3))
    (p * torch.arange(3.0)).sum().backward()
    assert bool(torch.isfinite(z.grad).all()) and float(z.grad.abs().max()) > 0


@pytest.mark.parametrize("r", [0.1, 0.3, 0.6])
def test_gradcheck_inside_a_face(r):
    z = tensor(0.5, 0.3, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparsestmax(z, r), (z,))


def one_hot(mean, var=None, **options):
    layer = SparseSwitchNorm2d(5, **options)
    with torch.no_grad():
        layer.mean_logits[layer.candidates.index(mean)] += 1
        layer.var_logits[layer.candidates.index(var or mean)] += 1
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    layer.decide()
    return layer


def test_one_hot_layers_are_the_normalisers():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 7, 3) * 3 + 10
    for name, plain in (
        ("bn", nn.BatchNorm2d(5)),
        ("in", nn.InstanceNorm2d(5, affine=True)),
        ("ln", nn.GroupNorm(1, 5)),
    ):
        layer = one_hot(name).train()
        plain.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
        for _ in range(3):
            torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
        if name == "bn":
            torch.testing.assert_close(layer.running_mean, plain.running_mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.running_var, plain.running_var, atol=1e-4, rtol=1e-5)
        layer.eval(), plain.eval()
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)


def test_gradients_of_the_layer():
    torch.manual_seed(1)
    layer = SparseSwitchNorm2d(3).double()
    with torch.no_grad():
        layer.mean_logits.copy_(tensor(0.5, 0.3, 0.2))
        layer.var_logits.copy_(tensor(0.2, 0.5, 0.3))
    layer.set_radius(0.3)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = (layer.mean_logits, layer.var_logits, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_the_schedule_ends_one_hot_and_frozen_ratios_do_not_move():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), SparseSwitchNorm2d(5), nn.ReLU(), SparseSwitchNorm2d(5, candidates=("in", "bn"))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = RadiusSchedule(30)
    for step in range(30):
        schedule(model, step)
        loss = (model(torch.randn(8, 2, 8, 8)) - 1).abs().pow(1.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert schedule(model, 30) == 1
    for layer in (model[1], model[3]):
        assert layer.choice() is not None
        before = [ratios.clone() for ratios in layer.ratios()]
        # momentum goes on moving the logits; the ratios must not follow
        with torch.no_grad():
            layer.mean_logits.normal_(), layer.var_logits.normal_()
        assert all(torch.equal(a, b) for a, b in zip(before, layer.ratios(), strict=True))
        optimizer.zero_grad()
        layer.train()(torch.randn(4, 5, 6, 6)).square().sum().backward()
        assert float(layer.mean_logits.grad.abs().max()) == 0 and float(layer.var_logits.grad.abs().max()) == 0
    assert len(ratio_parameters(model)) == 4 and schedule(model, 99) == 1


def test_means_and_variances_freeze_each_for_themselves():
    layer = SparseSwitchNorm2d(3)
    with torch.no_grad():
        layer.mean_logits[0] = 5
    layer.set_radius(0.1)
    assert layer.frozen.tolist() == [True, False] and layer.choice() is None
    with pytest.raises(Stays, match="one-hot"):
        layer.folded()
    with pytest.raises(Stays):
        collapse(nn.Sequential(layer))
    assert isinstance(collapse(nn.Sequential(layer), force=True)[0], nn.InstanceNorm2d)  # a tie takes the first


@pytest.mark.parametrize(
    ("mean", "var", "kind"),
    [
        ("bn", "bn", nn.BatchNorm2d),
        ("in", "in", nn.InstanceNorm2d),
        ("ln", "ln", nn.GroupNorm),
        ("bn", "in", TwoMomentNorm2d),
        ("ln", "bn", TwoMomentNorm2d),
    ],
)
def test_collapsed_networks_are_equal_in_eval(mean, var, kind):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), one_hot(mean, var))
    x = torch.randn(4, 2, 8, 8)
    model.train()(x)
    model.eval()
    expected = model(x)
    collapsed = collapse(copy.deepcopy(model))
    assert type(collapsed[1]) is kind
    torch.testing.assert_close(collapsed(x), expected, atol=1e-5, rtol=1e-5)


def test_state_round_trip_keeps_radius_and_choice():
    layer = one_hot("ln", "bn")
    layer.set_radius(0.7)
    fresh = SparseSwitchNorm2d(5)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.choice() == ("ln", "bn") and float(fresh.radius) == pytest.approx(0.7)


def test_eval_before_training_is_finite_and_parameters_are_counted():
    layer = SparseSwitchNorm2d(5).eval()
    assert bool(torch.isfinite(layer(torch.randn(2, 5, 4, 4))).all())
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5 + 6
    assert float(SparseSwitchNorm2d(5, last_gamma=True).weight.abs().max()) == 0


def test_large_means_keep_their_variance():
    """Sums of squares would lose it."""
    torch.manual_seed(4)
    x = torch.randn(8, 5, 6, 6) + 1e4
    for name in ("in", "ln", "bn"):
        y = one_hot(name, affine=True).train()
        with torch.no_grad():
            y.weight.fill_(1), y.bias.zero_()
        assert float(y(x).std()) == pytest.approx(1, abs=0.05)


def test_refusals():
    for candidates in ((), ("bn", "gn"), ("bn", "bn")):
        with pytest.raises(UsageError, match="candidates"):
            SparseSwitchNorm2d(3, candidates=candidates)
    with pytest.raises(UsageError, match="1x1"):
        SparseSwitchNorm2d(3).train()(torch.randn(4, 3, 1, 1))
    assert SparseSwitchNorm2d(3, candidates=("ln", "bn")).train()(torch.randn(4, 3, 1, 1)).shape == (4, 3, 1, 1)
    with pytest.raises(UsageError, match="total_steps"):
        RadiusSchedule(0)
