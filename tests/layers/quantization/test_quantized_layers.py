"""Fake-quantised and packed layers: exact grids, gradients, observers, optimal groups, bytes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.common import drawn
from torch import nn
from torch.nn import functional as F

from convette.errors import DataError, UsageError
from convette.layers.quantization import (
    ActivationQuantizer,
    PackedConv2d,
    PackedLinear,
    QuantConv2d,
    QuantLinear,
    fake_quantize,
    group_scales,
    observed_range,
    optimal_partition,
    pack,
    packed_bytes,
    unpack,
)
from convette.layers.quantization.deployed import deployed
from convette.layers.quantization.observers import _costs

# Rounding -------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.floats(0.01, 2.0), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_rounding_is_within_half_a_step_idempotent_and_keeps_zero(bits, scale, seed):
    x, top = drawn(200, seed=seed), 2**bits - 1
    zero = torch.tensor(float(top // 3))
    step = torch.tensor(scale)
    rounded = fake_quantize(x, step, zero, 0, top)
    inside = (x / step + zero > -0.5) & (x / step + zero < top + 0.5)
    assert ((x - rounded).abs()[inside] <= scale / 2 * 1.0001).all()
    assert torch.equal(fake_quantize(rounded, step, zero, 0, top), rounded)
    assert fake_quantize(torch.zeros(1), step, zero, 0, top).item() == 0
    assert len(rounded.unique()) <= top + 1


def test_gradients_are_the_formulas():
    x = torch.tensor([-3.0, -0.4, 0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.0), -3, 3).backward(torch.ones(5))
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    raw = np.array([-3.0, -0.4, 0.3, 0.9, 5.0]) / 0.5
    expected = [-3, *(np.round(raw) - raw)[1:4], 3]
    assert scale.grad.item() == pytest.approx(sum(expected) / np.sqrt(5 * 3))


def test_sixteen_levels_more_halve_the_error():
    x = drawn(5000)
    low, high = observed_range(x, "min_max", 8)
    errors = []
    for bits in (4, 8):
        quantizer = ActivationQuantizer(bits)
        quantizer.calibrate(x, "min_max")
        errors.append(float((quantizer(x) - x).square().mean().detach()))
    assert errors[1] < errors[0] / 100 and low < -3 and high > 3


# Observers ------------------------------------------------------------------------------------------------------------


def test_observers_cut_outliers_each_in_its_way():
    x = torch.cat([drawn(100_000).abs(), torch.tensor([100.0])])
    ranges = {name: observed_range(x, name, 4)[1] for name in ("min_max", "percentile", "mse", "entropy")}
    assert ranges["min_max"] == 100
    assert ranges["percentile"] == pytest.approx(np.percentile(x.numpy(), 99.99), rel=1e-3)
    assert all(1 < ranges[name] < 10 for name in ("percentile", "entropy"))
    bulk = torch.cat([drawn(100_000).abs(), torch.full((1,), 12.0)])
    assert observed_range(bulk, "mse", 4)[1] < 6
    assert all(observed_range(x, name, 4)[0] == 0 for name in ranges)
    low, high = observed_range(drawn(1000) - 5, "min_max")
    assert low < -5 and high == 0  # zero is always within


@pytest.mark.parametrize(
    "values", [torch.zeros(5), torch.zeros(0), torch.tensor([1.0, float("nan")])], ids=["constant", "none", "nan"]
)
def test_values_without_a_range_are_refused(values):
    with pytest.raises(DataError, match="no range"):
        observed_range(values)
    with pytest.raises(UsageError, match="min_max"):
        observed_range(drawn(4), "minmax")


# Groups ---------------------------------------------------------------------------------------------------------------


def group_error(weight, scales, group, bits):
    scale = scales[group].reshape(-1, 1)
    top = 2 ** (bits - 1) - 1
    flat = weight.flatten(1)
    return float(((flat / scale).round().clamp(-top, top) * scale - flat).square().sum())


@given(st.integers(2, 10), st.integers(0, 20), st.integers(2, 5))
@settings(max_examples=20, deadline=None)
def test_the_partition_is_the_best_there_is(count, seed, bits):
    spread = torch.exp(drawn(count, seed=seed))[:, None]
    weight = drawn(count, 12, seed=seed + 100) * spread
    before = None
    for groups in range(1, count + 1):
        scales, group = group_scales(weight, bits, groups)
        error = group_error(weight, scales, group, bits)
        assert before is None or error <= before * (1 + 1e-5) + 1e-9
        before = error


def test_the_dynamic_program_equals_brute_force():
    errors = np.random.default_rng(0).random((8, 5)) ** 3
    costs = _costs(errors)
    for groups in range(1, 9):
        best = min(
            sum(costs[a, b - 1] for a, b in itertools.pairwise([0, *cuts, 8]))
            for cuts in itertools.combinations(range(1, 8), groups - 1)
        )
        cuts = optimal_partition(costs, groups)
        assert cuts[0] == 0 and len(cuts) == groups
        assert sum(costs[a, b - 1] for a, b in itertools.pairwise([*cuts, 8])) == pytest.approx(best)


def test_one_group_is_per_tensor_and_all_are_per_channel():
    weight = drawn(6, 4, 3, 3) * torch.exp(drawn(6, seed=1))[:, None, None, None]
    one, group = group_scales(weight, 4, 1)
    assert len(one) == 1 and group.unique().tolist() == [0]
    each, group = group_scales(weight, 4)
    assert len(each) == 6 and group.tolist() == list(range(6))
    kept, order = group_scales(weight, 4, 2, "contiguous")
    assert order.tolist() == sorted(order.tolist()) and len(kept) == 2
    _, clusters = group_scales(weight, 4, 2, "kmeans")
    assert set(clusters.tolist()) <= {0, 1}
    with pytest.raises(UsageError, match="6 output channels"):
        group_scales(weight, 4, 7)
    with pytest.raises(UsageError, match="Did you mean 'sorted'"):
        group_scales(weight, 4, 2, "sorting")


# Layers ---------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(0, 70))
@settings(max_examples=40, deadline=None)
def test_packing_is_exact_and_takes_the_bytes_it_says(bits, count):
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int8)
    stored = pack(values, bits)
    assert len(stored) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(stored, bits, (count,)), values)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="do not fit into 2 bits"):
        pack(torch.tensor([2]), 2)
    for make in (lambda: QuantConv2d(1, 1, 1, bits=1), lambda: QuantLinear(1, 1, activation_bits=1)):
        with pytest.raises(UsageError, match="bits"):
            make()


@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (3, 3), (4, 8), (8, None)])
def test_a_packed_layer_computes_what_the_trained_one_does(bits, groups):
    torch.manual_seed(0)
    layer = QuantConv2d(4, 8, 3, 2, 1, groups=2, bits=bits, scale_groups=groups, activation_bits=4)
    packed = PackedConv2d(4, 8, (3, 3), 2, 1, groups=2, bits=bits, scale_groups=groups, activation_bits=4)
    x = drawn(2, 4, 9, 9)
    layer.calibrate_weight()
    layer.activation.calibrate(x)
    packed.take_over(layer)
    assert torch.equal(packed(x), layer(x))
    values = packed.weight_values() / packed.scales().reshape(-1, 1, 1, 1)
    assert (values - values.round()).abs().max() < 1e-4 and values.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4
    # Integers all through: what a processor without floats would compute.
    q = (x / layer.activation.log_scale.exp()).round() + layer.activation.zero
    q = q.clamp(0, 15) - layer.activation.zero
    accumulated = F.conv2d(q.double(), layer.integers().double(), None, 2, 1, 1, 2)
    scale = layer.activation.log_scale.exp().double() * layer.scales().double().reshape(1, -1, 1, 1)
    whole = accumulated * scale + layer.bias.double().reshape(1, -1, 1, 1)
    assert torch.allclose(whole, layer(x).double(), atol=1e-5)


def test_a_packed_linear_sees_new_bytes_and_survives_copies():
    import copy

    layer, packed = QuantLinear(5, 3, bits=4), PackedLinear(5, 3, bits=4)
    layer.calibrate_weight()
    x = drawn(2, 5)
    layer.activation.calibrate(x)
    before = packed(x)
    packed.take_over(layer)
    assert not torch.equal(packed(x), before) and torch.equal(packed(x), layer(x))
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), packed(x)) and twin.stored_weights == 15
    twin.load_state_dict(PackedLinear(5, 3, bits=4).state_dict())
    assert not torch.equal(twin(x), packed(x))


def test_weights_learn_straight_through_and_scales_learn_too():
    torch.manual_seed(0)
    layer = QuantConv2d(2, 4, 3, bits=3)
    layer.calibrate_weight()
    x = drawn(8, 2, 6, 6)
    layer.activation.calibrate(x)
    target = F.conv2d(x, drawn(4, 2, 3, 3, seed=5) * 0.2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert layer.log_scale.grad.abs().min() > 0 and layer.scales().min() > 0


def test_the_deployed_form_is_integers_and_computes_the_same():
    net = nn.Sequential(QuantConv2d(1, 4, 3, bits=4, activation_bits=4), nn.ReLU(), nn.Flatten(), QuantLinear(64, 3))
    x = drawn(4, 1, 6, 6)
    for layer in (net[0], net[3]):
        layer.calibrate_weight()
    net[0].activation.calibrate(x)
    net[3].activation.calibrate(net[:3](x))
    form = deployed(net)
    assert torch.allclose(form(x), net(x), atol=0.05 * float(net(x).abs().max()))
    assert form[0].integers.dtype == torch.int8 and type(net[0]) is QuantConv2d
