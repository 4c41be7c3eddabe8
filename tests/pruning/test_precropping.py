import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import WidthCost, count
from convette.errors import BudgetError, UsageError
from convette.models import create_model
from convette.pruning.precropping import (
    LayerLoad,
    initialise_again,
    keep_ratios,
    layer_loads,
    precrop,
    synexp_densities,
)
from convette.surgery import apply, trace

LAYERS = st.lists(st.floats(10, 1e5), min_size=2, max_size=12)


@settings(deadline=None, max_examples=60)
@given(weights=LAYERS, share=st.floats(0.02, 0.98), scale=st.floats(0.1, 50))
def test_water_filling_meets_the_budget_and_is_optimal(weights, share, scale):
    n = np.array(weights)
    p = synexp_densities(n, share * n.sum())
    assert n @ p == pytest.approx(share * n.sum(), rel=1e-9)
    assert (p > 0).all() and (p <= 1).all()
    open_ = p < 1 - 1e-12
    kept = (n * p)[open_]
    # Every layer that is not whole keeps the same number of weights, and no whole one has more than that.
    assert np.ptp(kept) <= 1e-6 * kept.max()
    assert (n[~open_] <= kept.max() * (1 + 1e-9)).all()
    assert np.allclose(synexp_densities(scale * n, share * scale * n.sum()), p)
    assert np.allclose(synexp_densities(n, n.sum()), 1.0)


@settings(deadline=None, max_examples=40)
@given(
    layers=st.lists(st.tuples(st.floats(10, 1e4), st.floats(10, 1e4)), min_size=2, max_size=8),
    shares=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)),
)
def test_two_budgets_hold_together_and_tightening_never_helps(layers, shares):
    n, m = np.array([a for a, _ in layers]), np.array([b for _, b in layers])

    def objective(a, b):
        p = synexp_densities(n, a * n.sum(), macs=m, macs_budget=b * m.sum())
        assert n @ p <= a * n.sum() * (1 + 1e-6) and m @ p <= b * m.sum() * (1 + 1e-6)
        assert (p > 0).all() and (p <= 1).all()
        return float(np.log(p).sum())

    value = objective(*shares)
    assert objective(shares[0] * 0.8, shares[1]) <= value + 1e-4
    assert objective(shares[0], shares[1] * 0.8) <= value + 1e-4


def test_the_expected_path_score_is_that_of_random_masks():
    generator = torch.Generator().manual_seed(0)
    shapes, densities = [(12, 8), (10, 12), (4, 10)], (0.6, 0.4, 0.7)
    weights = [torch.rand(shape, generator=generator) for shape in shapes]
    ones = torch.ones(8)
    whole = weights[2] @ (weights[1] @ (weights[0] @ ones))
    total = 0.0
    for _ in range(1000):
        masked = [w * (torch.rand(w.shape, generator=generator) < p) for w, p in zip(weights, densities, strict=True)]
        total += float((masked[2] @ (masked[1] @ (masked[0] @ ones))).sum())
    assert total / 1000 == pytest.approx(float(whole.sum()) * np.prod(densities), rel=0.02)


def test_a_uniform_density_keeps_its_root_everywhere():
    loads = [
        LayerLoad("a", 100.0, 1.0, {"x": 1.0, "y": 1.0}),
        LayerLoad("b", 300.0, 1.0, {"y": 1.0, "z": 1.0}),
        LayerLoad("c", 200.0, 1.0, {"z": 1.0, "x": 1.0}),
    ]
    ratios = keep_ratios(loads, np.full(3, 0.49))
    assert all(ratio == pytest.approx(0.7, abs=1e-3) for ratio in ratios.values())
    assert keep_ratios([LayerLoad("fixed", 1.0, 1.0, {})], np.array([0.5])) == {}
    assert max(keep_ratios(loads, np.full(3, 4.0)).values()) <= 1 + 1e-9
    assert keep_ratios(loads, np.full(3, 4.0), most=2.0)["x"] == pytest.approx(2.0, abs=1e-2)


@pytest.mark.parametrize("budget", ["params<=30%", "macs<=50%", "params<=40%, macs<=40%"])
def test_a_cropped_network_meets_its_budget_within_a_hundredth(budget):
    model, example = create_model("resnet20", seed=0), torch.randn(1, 3, 32, 32)
    cropped = precrop(model, example, budget)
    start, end = count(model, example), count(cropped.model, example)
    shares = {"params": end.parameters / start.parameters, "macs": end.macs / start.macs}
    limits = {part.split("<=")[0].strip(): float(part.split("<=")[1][:-1]) / 100 for part in budget.split(",")}
    assert all(shares[name] <= value for name, value in limits.items())
    assert max(shares[name] / value for name, value in limits.items()) > 0.985
    assert len({after for _, after in cropped.widths.values()}) > 1


def test_parameters_come_from_late_layers_and_macs_from_early_ones():
    model, example = create_model("resnet20", seed=0), torch.randn(1, 3, 32, 32)
    by_weights, by_macs = (precrop(model, example, budget).widths for budget in ("params<=30%", "macs<=30%"))
    first, last = "layer1.1.conv1", "layer3.1.conv1"
    assert by_weights[first][1] / 16 > by_weights[last][1] / 64
    assert by_macs[first][1] / 16 < by_weights[first][1] / 16


def test_before_initialisation_the_first_channels_are_the_old_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    example = torch.randn(2, 1, 8, 8)
    cropped = precrop(model, example, "params<=50%", initialise=False).model
    kept = cropped[0].out_channels
    sliced = copy.deepcopy(model)
    graph = trace(sliced, example)
    apply(sliced, graph.shrink({graph.groups[0].name: torch.arange(kept)}))
    assert torch.equal(cropped(example), sliced(example))
    fresh = precrop(model, example, "params<=50%", seed=1).model
    assert not torch.equal(fresh[0].weight, cropped[0].weight) and fresh[0].out_channels == kept
    again = precrop(model, example, "params<=50%", seed=1).model
    assert torch.equal(again[0].weight, fresh[0].weight)


def test_reconfigured_widths_grow_and_shrink_at_the_same_cost():
    model, example = create_model("resnet20", seed=0), torch.randn(1, 3, 32, 32)
    found = precrop(model, example, "macs<=100%", reconfigure=True)
    ratio = count(found.model, example).macs / count(model, example).macs
    assert 0.97 < ratio <= 1.0
    changes = [after / before for before, after in found.widths.values()]
    assert min(changes) < 1 < max(changes) <= 2
    assert found.model.train()(example.repeat(2, 1, 1, 1)).shape == (2, 10)


def test_streams_stay_whole_if_asked():
    model, example = create_model("resnet20", seed=0), torch.randn(1, 3, 32, 32)
    graph = trace(model, example)
    found = precrop(model, example, "macs<=50%", inner_only=True)
    for name, (before, after) in found.widths.items():
        if len(graph[name].of("producer")) > 1:
            assert before == after
    assert count(found.model, example).macs <= 0.5 * count(model, example).macs


def test_loads_count_what_the_network_counts():
    model, example = create_model("mobilenet_v2", num_classes=10, seed=0), torch.randn(1, 3, 32, 32)
    graph = trace(model, example)
    loads = layer_loads(graph)
    assert sum(load.macs for load in loads) == count(model, example).macs
    widths = WidthCost(model, example, graph)
    assert {name for load in loads for name in load.groups} <= set(widths.groups)


def test_initialisation_leaves_the_callers_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    initialise_again(model, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_is_refused():
    model, example = create_model("resnet20", seed=0), torch.randn(1, 3, 32, 32)
    with pytest.raises(BudgetError, match="can go down to"):
        precrop(model, example, "macs<=0.01%")
    with pytest.raises(UsageError, match="latency"):
        precrop(model, example, "latency<=1ms")
    with pytest.raises(UsageError, match="most"):
        precrop(model, example, "macs<=50%", most=0.5)
    with pytest.raises(UsageError, match="above 0"):
        synexp_densities(np.ones(2), 0.0)
