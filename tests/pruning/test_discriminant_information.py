"""Discriminant information: both forms, its bounds, its derivative, and what it makes of duplicates and noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.pruning import discriminant_information, discriminant_value, score_units
from convette.pruning.criteria.discriminant_information import _scores, centred, class_basis
from convette.surgery import trace


def problem(seed: int, images: int = 24, units: int = 5, entries: int = 3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, units, entries, generator=generator, dtype=torch.float64)
    return features, torch.arange(images) % 4


def primal(flat: torch.Tensor, labels: torch.Tensor, ridge: float) -> float:
    flat = flat - flat.mean(0)
    total = flat.T @ flat
    rho = ridge * total.trace() / len(flat)
    between = torch.zeros_like(total)
    for label in labels.unique():
        mean = flat[labels == label].mean(0)
        between += (labels == label).sum() * mean.outer(mean)
    return float(torch.linalg.solve(total + rho * torch.eye(len(total), dtype=total.dtype), between).trace())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-1, 1e-2, 1e-4]))
def test_both_forms_agree_and_stay_in_their_bounds(seed, ridge):
    features, labels = problem(seed)
    value = discriminant_value(features.flatten(1), labels, ridge)
    assert value == pytest.approx(primal(features.flatten(1), labels, ridge), rel=1e-8)
    assert 0 <= value <= 3
    turned = features.flatten(1) @ torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64))[0] + 7
    assert discriminant_value(turned, labels, ridge) == pytest.approx(value, rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_unit_more_never_takes_information_away(seed):
    features, labels = problem(seed)
    units, basis = centred(features), class_basis(labels)
    scores = {mode: _scores(units, basis, mode, 1e-2) for mode in ("differential", "leave_one_out", "individual")}
    assert all((score >= 0).all() for score in scores.values())
    gram = torch.einsum("num,kum->unk", units, units)
    weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
    rho = 1e-2 * gram.sum(0).trace() / len(units)
    whole = torch.einsum("u,unk->nk", weights, gram)
    value = (basis @ basis.T @ whole @ torch.linalg.inv(whole + rho * torch.eye(24, dtype=torch.float64))).trace()
    (slopes,) = torch.autograd.grad(value, weights)
    assert torch.allclose(scores["differential"], slopes, rtol=1e-7)
    # The loss of the whole weight is at least what the slope at 1 says, DI being concave in the weights.
    assert (scores["leave_one_out"] >= scores["differential"] - 1e-9).all()


def test_limits():
    labels = torch.arange(400) % 5
    indicators = torch.nn.functional.one_hot(labels).double()
    assert discriminant_value(indicators, labels, 1e-6) == pytest.approx(4, abs=1e-3)
    assert discriminant_value(torch.ones(400, 3, dtype=torch.float64), labels) == 0
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert discriminant_value(noise, labels, 1e-6) == pytest.approx(4 * 6 / 400, rel=0.5)


def test_a_duplicate_is_worth_little_beside_its_twin_and_much_alone():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    telling = torch.stack([(labels == k).double() for k in (0, 0, 1)], dim=1)
    features = telling + 0.1 * torch.randn(120, 3, generator=generator, dtype=torch.float64)
    features[:, 1] = features[:, 0]
    units, basis = centred(features.unsqueeze(2)), class_basis(labels)
    alone = _scores(units, basis, "individual", 1e-2)
    without = _scores(units, basis, "leave_one_out", 1e-2)
    assert alone[0] == pytest.approx(float(alone[1])) and alone.min() > 0.5
    assert without[:2].max() < 0.1 * without[2]


def network_that_tells() -> tuple[nn.Module, list]:
    """Units 0 and 1 see the class, unit 2 noise, unit 3 nothing."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 3, 6, 6, generator=generator)
    images[:, 0] = (labels == 0).float()[:, None, None] + 0.05 * images[:, 0]
    images[:, 1] = (labels == 1).float()[:, None, None] + 0.05 * images[:, 1]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])[:, :, None, None])
    return model.eval(), [(images[:30], labels[:30]), (images[30:], labels[30:])]


@pytest.mark.parametrize("mode", ["differential", "leave_one_out", "individual"])
@pytest.mark.parametrize("greedy", [0.0, 0.25])
@pytest.mark.parametrize("normalise", ["relative", "max"])
def test_units_that_tell_the_classes_are_kept(mode, greedy, normalise):
    model, data = network_that_tells()
    graph = trace(model, data[0][0][:1])
    scores = discriminant_information(model, graph, data, mode=mode, greedy=greedy, normalise=normalise)["0"]
    assert set(scores.topk(2).indices.tolist()) == {0, 1} and scores.argmin() == 3
    with torch.no_grad():  # the scale of a unit's layer must not matter
        model[0].weight.mul_(100)
    again = discriminant_information(model, graph, data, mode=mode, greedy=greedy, normalise=normalise)["0"]
    assert torch.allclose(again, scores, rtol=1e-3, atol=1e-7)


def test_what_cannot_be_asked_for_is_named():
    model, data = network_that_tells()
    graph = trace(model, data[0][0][:1])
    with pytest.raises(UsageError, match=r"mode = 'differentail'.*'differential'"):
        score_units("discriminant_information", model, graph, data, options={"mode": "differentail"})
    with pytest.raises(UsageError, match="at least two classes"):
        discriminant_information(model, graph, [(data[0][0], torch.zeros(30, dtype=torch.int64))])
    with pytest.raises(UsageError, match="greedy=1"):
        discriminant_information(model, graph, data, greedy=1.0)
