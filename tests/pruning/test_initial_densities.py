"""Densities of masks at initialisation, as PreCrop takes them: exact shares, data where it counts, weights untouched."""

import numpy as np
import pytest
import torch
from torch import nn

from convette.cost import Limit, WidthCost, count
from convette.errors import UsageError
from convette.pruning import random
from convette.pruning.initial_densities import SOURCES, _gradient_scores, mask_densities, synflow_masks
from convette.pruning.precropping import LayerLoad, keep_ratios, precrop, precropping, synexp_densities
from convette.surgery import trace


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


EXAMPLE = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def data(seed: int) -> list:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(12, 1, 8, 8, generator=draw), torch.arange(12) % 5) for _ in range(2)]


@pytest.mark.parametrize("source", SOURCES)
def test_the_share_is_met_and_the_network_is_left_bit_for_bit(source):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = mask_densities(model, EXAMPLE, 0.3, source, calibration=data(0), steps=20)
    assert set(found) == {"0", "3", "7"} and all(0 < p <= 1 for p in found.values())
    sizes = {"0": 72, "3": 1152, "7": 320}
    assert sum(found[name] * size for name, size in sizes.items()) == pytest.approx(0.3 * 1544, abs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert mask_densities(model, EXAMPLE, 1, source, calibration=data(0), steps=2) == dict.fromkeys(sizes, 1.0)


def test_synflow_looks_at_no_data_snip_and_grasp_do():
    model = net()
    assert mask_densities(model, EXAMPLE, 0.2, "synflow", steps=5) == mask_densities(
        model, 7 * EXAMPLE, 0.2, "synflow", calibration=data(3), steps=5
    )
    for source in ("snip", "grasp"):
        first, second = (mask_densities(model, EXAMPLE, 0.2, source, calibration=data(k)) for k in (0, 1))
        assert first != second
        with pytest.raises(UsageError, match=source):
            mask_densities(model, EXAMPLE, 0.2, source)


def test_synflow_scores_are_paths_and_rounds_keep_layers_alive():
    """In a chain of linear layers every layer holds the same sum of |w dR/dw|: the score of all paths."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40, bias=False), nn.ReLU(), nn.Linear(40, 4, bias=False))
    masks = synflow_masks(model, torch.ones(1, 6), 0.05, 100)
    paths = masks["2"].double() @ masks["0"].double()
    assert paths.sum() > 0 and all(mask.any() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.05 * 400)
    # A unit that nothing reads keeps no weights: there is no path through it.
    assert not masks["0"][~masks["2"].any(0)].any()


def test_snip_and_grasp_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    batches = data(0)[:1]
    weight = model[1].weight.detach().double().clone()

    def loss(w):
        logits = batches[0][0].double().flatten(1) @ w.T + model[1].bias.detach().double()
        return nn.functional.cross_entropy(logits, batches[0][1])

    slope = torch.autograd.functional.jacobian(loss, weight)
    product = torch.autograd.functional.vhp(loss, weight, slope)[1]
    assert torch.allclose(_gradient_scores(model, batches, "snip")["1"], (weight * slope).abs(), rtol=1e-3, atol=1e-7)
    assert torch.allclose(_gradient_scores(model, batches, "grasp")["1"], weight * product, rtol=1e-3, atol=1e-6)


def test_small_layers_are_denser_by_erk():
    found = mask_densities(net(), EXAMPLE, 0.2, "erk")
    raw = {"0": 1 - (1 + 8 + 6) / 72, "3": 1 - (8 + 16 + 6) / 1152, "7": 1 - 69 / 320}
    assert found["3"] / found["7"] == pytest.approx(raw["3"] / raw["7"])
    assert mask_densities(net(), EXAMPLE, 0.98, "erk")["3"] == 1.0


@pytest.mark.parametrize("source", ["synflow", "grasp", "erk"])
def test_a_network_is_cropped_by_them_within_its_budget(source):
    start = count(net(), EXAMPLE).parameters
    cropped = precrop(net(), EXAMPLE, "params<=30%", density=source, calibration=data(0))
    assert 0.2 * start < count(cropped.model, EXAMPLE).parameters <= 0.3 * start
    assert cropped.densities == pytest.approx(
        mask_densities(net(), EXAMPLE, int(0.3 * start) / start, source, calibration=data(0)), abs=2e-3
    )
    with pytest.raises(UsageError, match="reconfigure"):
        precrop(net(), EXAMPLE, "params<=100%", density=source, reconfigure=True)


def test_the_allocation_takes_them_too():
    model = net().eval()
    graph = trace(model, EXAMPLE)
    cost = WidthCost(model, EXAMPLE, graph)
    limit = Limit("parameters", None, 0.5 * cost.parameters({}), False, None)
    found = {}
    for density in ("synexp", "erk", "magnitude"):
        selection = precropping(random(model, graph, seed=0), graph, cost, limit, density=density)
        assert cost.parameters(selection) <= limit.value
        found[density] = tuple(len(kept) for kept in selection.values())
    assert len(set(found.values())) > 1


def test_the_cautious_rule_keeps_the_least_that_is_asked_for():
    loads = [LayerLoad("a", 100.0, 1.0, {"x": 1.0}), LayerLoad("b", 300.0, 1.0, {"x": 1.0, "y": 1.0})]
    p = np.array([0.9, 0.25])
    assert keep_ratios(loads, p, rule="min") == pytest.approx({"x": 0.5, "y": 0.5})
    assert keep_ratios(loads, p, rule="geometric") == pytest.approx({"x": (0.9 * 0.5) ** 0.5, "y": 0.5})
    with pytest.raises(UsageError, match="rule='mean'"):
        keep_ratios(loads, p, rule="mean")


def test_no_layer_goes_below_the_least_density():
    n, m = np.array([10.0, 100, 1000, 5000]), np.array([900.0, 500, 300, 10])
    p = synexp_densities(n, 0.2 * n.sum(), least=0.15)
    assert p.min() == 0.15 < synexp_densities(n, 0.1 * n.sum(), least=0.05).min() + 0.15
    assert n @ p == pytest.approx(0.2 * n.sum(), rel=1e-9)
    both = synexp_densities(n, 0.2 * n.sum(), macs=m, macs_budget=0.5 * m.sum(), least=0.15)
    assert both.min() >= 0.15 * (1 - 1e-6)
    assert n @ both <= 0.2 * n.sum() * (1 + 1e-9) and m @ both <= 0.5 * m.sum() * (1 + 1e-9)
    with pytest.raises(UsageError, match=r"least = 0\.3"):
        synexp_densities(n, 0.2 * n.sum(), least=0.3)
