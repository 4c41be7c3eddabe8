"""TCC: one-way filters equal the dense kernel, decompositions, counts, variances, budgets, the wave equation."""

import copy

import pytest
import torch
from torch import nn

from convette.data.wave2d import simulate_wave, wave2d, wave_energy
from convette.errors import UsageError
from convette.layers import fold_layers
from convette.layers.convolution import (
    FactorizedConv2d,
    FactorizedConv3d,
    break_even,
    compose,
    compress_a_priori,
    decompose,
    factor_parameters,
    factorize,
    materialize,
    rank_for,
)

FORMS = ("per_filter", "svd", "cp")
PLACES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (1, 0)},
    {"padding": 2, "dilation": 2},
    {"padding": "same"},
    {"kernel_size": (1, 5), "padding": (0, 2)},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_one_way_filters_equal_the_composed_kernel(form, place):
    torch.manual_seed(0)
    layer = FactorizedConv2d(4, 6, **({"kernel_size": 3} | place), rank=3, form=form, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.folded()(x), rtol=1e-12, atol=1e-12)


def test_volumes_groups_and_other_padding():
    torch.manual_seed(1)
    for form in ("per_filter", "cp"):
        layer = FactorizedConv3d(4, 6, 3, padding=1, form=form, dtype=torch.float64)
        x = torch.randn(2, 4, 5, 4, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.folded()(x), rtol=1e-12, atol=1e-12)
    for options in ({"groups": 2}, {"groups": 4}, {"padding": 1, "padding_mode": "reflect"}):
        layer = FactorizedConv2d(4, 8, 3, **options, dtype=torch.float64)
        x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.folded()(x), rtol=1e-12, atol=1e-12)
    sliced = FactorizedConv2d(4, 8, 3, groups=2, form="svd")
    torch.testing.assert_close(sliced(x.float()), sliced.folded()(x.float()), rtol=1e-5, atol=1e-5)


def test_a_term_for_each_tap_is_any_kernel():
    """b and c unit vectors, a the tap's channels: bit for bit."""
    torch.manual_seed(2)
    weight = torch.randn(5, 4, 3, 3)
    layer = FactorizedConv2d(4, 5, 3, rank=9)
    rows = torch.eye(3).repeat_interleave(3, 0).expand(5, 9, 3)
    columns = torch.eye(3).repeat(3, 1).expand(5, 9, 3)
    layer.set_factors([weight.flatten(2).transpose(1, 2), rows, columns])
    assert torch.equal(layer.dense_weight(), weight)


def test_decompositions_are_exact_where_they_can_be_and_better_with_rank():
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3)
    for form, rank in (("per_filter", 9), ("svd", 3)):
        layer = FactorizedConv2d(4, 6, 3, rank=rank, form=form)
        layer.take_over(conv)
        torch.testing.assert_close(layer.dense_weight(), conv.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.ways[-1].bias if form != "svd" else layer.bias, conv.bias)
    tensor = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    errors = [float((compose(decompose(tensor, rank)) - tensor).norm() / tensor.norm()) for rank in (1, 2, 4)]
    unrefined = float((compose(decompose(tensor, 2, 0)) - tensor).norm() / tensor.norm())
    assert errors[0] > errors[1] > errors[2] > 0.01
    assert errors[1] < unrefined
    known = compose([torch.randn(2, 3, size, dtype=torch.float64) for size in (8, 5, 5)])
    torch.testing.assert_close(compose(decompose(known, 3, 500)), known, rtol=1e-3, atol=1e-3)


def test_rank_above_what_the_tensor_has_stays_finite_and_can_learn():
    layer = FactorizedConv2d(1, 2, 3, rank=12)
    layer.take_over(nn.Conv2d(1, 2, 3))
    assert all(bool(torch.isfinite(factor).all()) for factor in layer.factors())
    zero = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(zero.weight)
    layer.take_over(zero)
    assert float(layer.dense_weight().detach().abs().max()) == 0
    layer(torch.randn(1, 1, 5, 5)).sum().backward()
    assert float(layer.channel.weight.grad.abs().max()) > 0


def test_published_counts():
    assert factor_parameters(64, 1, (3, 3), 1) == 70 and factor_parameters(64, 1, (3, 3), 4) == 280
    assert factor_parameters(16, 1, (5, 5), 2) == 52
    assert break_even(64, 64, (3, 3)) == pytest.approx(576 / 70) and break_even(16, 8, (5, 5)) == pytest.approx(
        400 / 26
    )
    layer = FactorizedConv2d(16, 32, 5, rank=2)
    assert sum(p.numel() for p in layer.parameters()) == 32 * 2 * (16 + 5 + 5) + 32
    assert rank_for(300, 64, 1, (3, 3)) == 4 and rank_for(10, 64, 1, (3, 3)) == 1
    assert sum(p.numel() for p in FactorizedConv2d(16, 32, 3, rank=5, form="cp", bias=False).parameters()) == 5 * 54
    assert sum(p.numel() for p in FactorizedConv2d(3, 4, 7, form="svd", bias=False).parameters()) == 4 * 3 * 2 * 14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["normal", "svd"])
def test_the_kernel_starts_with_hes_variance(form, init):
    torch.manual_seed(4)
    rank = 40 if form == "cp" else 3  # few shared vectors leave the estimate no accuracy
    layers = [FactorizedConv2d(64, 64, 3, rank=rank, form=form, init=init) for _ in range(4)]
    variance = torch.cat([layer.dense_weight().detach().flatten() for layer in layers]).var()
    expected = 2 / (64 * 9)
    if init == "normal":
        assert float(variance) == pytest.approx(expected, rel=0.1)
    else:
        assert expected * 0.02 < float(variance) <= expected * 1.05  # what the terms leave out is lost


def test_a_stack_keeps_its_scale():
    torch.manual_seed(5)
    x = torch.randn(2, 64, 8, 8)
    moments = []
    with torch.no_grad():
        for _ in range(10):
            layer = FactorizedConv2d(64, 64, 3, padding=1, padding_mode="circular")
            x = layer(x).relu()
            moments.append(float(x.square().mean()))
    assert 1 / 3 < moments[-1] / moments[0] < 3


def test_gauge_and_order_of_terms_do_not_matter():
    torch.manual_seed(6)
    layer = FactorizedConv2d(3, 4, 3, dtype=torch.float64)
    expected = layer.dense_weight().detach().clone()
    a, b, c = (factor.detach().clone() for factor in layer.factors())
    layer.set_factors([a * 3, b * 0.5, c / 1.5])
    torch.testing.assert_close(layer.dense_weight().detach(), expected)
    layer.set_factors([factor.flip(1) for factor in (a, b, c)])
    torch.testing.assert_close(layer.dense_weight().detach(), expected)


def test_weight_decay_balances_the_factors():
    """Gradient flow of the decay in the gauge: the product stays, the norms meet."""
    torch.manual_seed(7)
    layer = FactorizedConv2d(4, 2, 3, rank=1, bias=False, dtype=torch.float64)
    aim = layer.dense_weight().detach().clone()
    a, b, c = (factor.detach().clone() for factor in layer.factors())
    layer.set_factors([a * 6, b / 3, c / 2])
    optimizer = torch.optim.SGD(layer.parameters(), 0.02, weight_decay=0.02)
    spread = []
    for _ in range(600):
        loss = 0.5 * (layer.dense_weight() - aim).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms = torch.stack([factor.detach().norm() for factor in layer.factors()])
        spread.append(float(norms.max() / norms.min()))
    assert spread[-1] < 0.8 * spread[0]


def test_gradients():
    torch.manual_seed(8)
    for form in FORMS:
        layer = FactorizedConv2d(2, 3, 3, form=form, dtype=torch.float64)
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


def test_the_largest_terms_are_kept():
    torch.manual_seed(9)
    for form in FORMS:
        layer = FactorizedConv2d(3, 4, 3, rank=3, form=form)
        assert layer.truncated(1).rank == 1
        torch.testing.assert_close(layer.truncated(3).dense_weight(), layer.dense_weight())
    weak = FactorizedConv2d(3, 4, 3, rank=2)
    with torch.no_grad():
        weak.factors()[0][:, 0] *= 1e-6
    torch.testing.assert_close(weak.truncated(1).dense_weight(), weak.dense_weight(), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="cannot keep 4 of 3"):
        layer.truncated(4)


def test_networks_from_the_start_of_training_from_a_trained_one_and_back():
    from torchvision.models import mobilenet_v2

    from convette.models import create_model

    torch.manual_seed(10)
    model = create_model("resnet20", seed=0)
    dense = sum(p.numel() for p in model.parameters())
    assert compress_a_priori(model, 2) is model
    convs = [m for m in model.modules() if isinstance(m, FactorizedConv2d)]
    assert len(convs) == 19 and all(m.rank == 2 for m in convs)
    assert sum(p.numel() for p in model.parameters()) < 0.27 * dense
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    assert len(fold_layers(model).kept) == 19  # compressed networks stay small
    torch.testing.assert_close(materialize(model)(x), expected, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == dense
    other = compress_a_priori(create_model("resnet20", seed=0), budget=0.5)
    ranks = [m.rank for m in other.modules() if isinstance(m, FactorizedConv2d)]
    assert max(ranks) == 4 and min(ranks) == 1
    result = factorize(
        trained := create_model("resnet20", seed=0), error=0.4, where=lambda name, _: name.startswith("layer2.0")
    )
    assert result.layers and all(after < before and error <= 0.4 for before, after, error in result.layers.values())
    tight = factorize(create_model("resnet20", seed=0), error=0.01, where=lambda name, _: name == "conv1")
    assert list(tight.left) == ["conv1"] and "break-even" in tight.left["conv1"]
    trained.eval()(x)
    mobile = compress_a_priori(mobilenet_v2(num_classes=3), 1)
    assert type(mobile.features[1].conv[0][0]) is FactorizedConv2d  # depthwise 3x3: 7 against 9
    assert mobile.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_factorized_network_is_written_and_read(tmp_path):
    from convette.models import create_model, load, save

    model = create_model("resnet20", seed=0)
    factorize(model, 1, where=lambda name, module: name.startswith("layer1"))
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(load(tmp_path / "model.safetensors")(x), model.eval()(x))


def test_refusals():
    with pytest.raises(UsageError, match="deploy 'fast'"):
        FactorizedConv2d(3, 4, 3, deploy="fast")
    with pytest.raises(UsageError, match="form 'tucker'"):
        FactorizedConv2d(3, 4, 3, form="tucker")
    with pytest.raises(UsageError, match="groups must be 1"):
        FactorizedConv2d(4, 4, 3, groups=2, form="cp")
    with pytest.raises(UsageError, match="rank 0"):
        FactorizedConv2d(3, 4, 3, rank=0)
    with pytest.raises(UsageError, match="2-D kernels"):
        FactorizedConv3d(3, 4, 3, form="svd")
    with pytest.raises(UsageError, match="expected an input"):
        FactorizedConv2d(3, 4, 3)(torch.zeros(1, 2, 5, 5))
    with pytest.raises(UsageError, match="gets smaller"):
        compress_a_priori(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(UsageError, match="budget 2"):
        compress_a_priori(nn.Conv2d(3, 4, 3), budget=2)
    with pytest.raises(UsageError, match="one of"):
        factorize(nn.Conv2d(3, 4, 3), 2, budget=0.5)
    fresh = FactorizedConv2d(3, 4, 3, adopt=False)
    before = copy.deepcopy(fresh.state_dict())
    fresh.take_over(nn.Conv2d(3, 4, 3))
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_waves_keep_their_energy_and_their_speed():
    torch.manual_seed(11)
    energy = wave_energy(simulate_wave(torch.randn(3, 24, 24, dtype=torch.float64), 200))
    assert float((energy.amax(1) / energy.amin(1)).max()) < 1.01
    bump = torch.exp(-((torch.arange(200.0) - 60) ** 2) / 32)
    fields = simulate_wave(bump[None, :, None].expand(1, 200, 3), 160)
    fronts = [int(fields[0, time, 61:, 0].argmax()) + 61 for time in (40, 160)]
    assert (fronts[1] - fronts[0]) / 120 == pytest.approx(0.5, rel=0.03)
    inputs, targets = wave2d(8, size=16, ahead=5)
    assert inputs.shape == (8, 2, 16, 16) and targets.shape == (8, 1, 16, 16)
    assert torch.equal(inputs, wave2d(8, size=16, ahead=5)[0])
    with pytest.raises(UsageError, match="stable"):
        simulate_wave(bump[None, :, None].expand(1, 200, 3), 5, courant=0.9)
    with pytest.raises(UsageError, match="ahead 0"):
        wave2d(8, ahead=0)
