"""Linear redundancy and the redistribution that goes with any criterion."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.pruning import linear_redundancy, redistribute, score_units
from convette.pruning.criteria.linear_redundancy import ReaderState, eliminate
from convette.surgery import apply, masked, trace


class Branches(nn.Module):
    """Two convolutions side by side, concatenated, read by a padded convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1)
        self.both = nn.Conv2d(11, 7, 3, padding=1)
        self.head = nn.Linear(7 * 20, 4)

    def forward(self, x):
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], dim=1)
        return self.head(self.both(x).relu().flatten(1))


@pytest.fixture
def branches_and_data():
    torch.manual_seed(0)
    return Branches().eval(), [(torch.randn(250, 2, 5, 4), torch.zeros(250))]


def duplicate(layer: nn.Module, source: int, target: int, factor: float = 1.0) -> None:
    with torch.no_grad():
        layer.weight[target] = factor * layer.weight[source]
        layer.bias[target] = factor * layer.bias[source]


def without(size: int, *units: int) -> torch.Tensor:
    return torch.tensor([unit for unit in range(size) if unit not in units])


def state_of(rows: torch.Tensor, weight: torch.Tensor, k: int = 1) -> ReaderState:
    second = rows.T @ rows / len(rows)
    energy = float((rows @ weight.T).square().sum(1).mean())
    return ReaderState(torch.linalg.inv(second), weight.T @ weight, second.clone(), k, energy)


@pytest.mark.parametrize("k", [1, 2])
def test_damage_and_downdate_are_those_of_least_squares(k):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=generator, dtype=torch.float64) @ torch.randn(
        8, 8, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    state = state_of(rows, weight, k)
    out = rows @ weight.T
    damage = state.damage("damage")
    for unit in range(8 // k):
        kept = without(8, *range(k * unit, k * unit + k))
        best = torch.linalg.lstsq(rows[:, kept], out).solution
        error = (rows[:, kept] @ best - out).square().sum(1).mean()
        assert float(damage[unit]) == pytest.approx(float(error) / state.energy, rel=1e-9)
    state.remove(1)
    kept = without(8, *range(k, 2 * k))
    second = rows[:, kept].T @ rows[:, kept] / len(rows)
    assert torch.allclose(state.inverse[kept][:, kept], torch.linalg.inv(second), rtol=1e-8)
    taken = torch.linalg.lstsq(rows[:, kept], out).solution.T
    assert torch.allclose(state.weights[kept][:, kept], taken.T @ taken, rtol=1e-8)


def test_more_units_than_rows_leave_as_many_free():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    second = rows.T @ rows / 5
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.inv(second + 1e-9 * torch.eye(9, dtype=torch.float64))
    energy = float((rows @ weight.T).square().sum(1).mean())
    scores = eliminate([ReaderState(inverse, weight.T @ weight, second, 1, energy)], 9)
    assert (scores < 1e-6).sum() >= 4 and scores.max() > 0.1


def test_what_others_can_say_goes_first_and_nothing_is_lost(branches_and_data):
    model, data = branches_and_data
    duplicate(model.left, 0, 3, 2.0)
    duplicate(model.right, 1, 4)
    graph = trace(model, data[0][0][:1])
    scores = linear_redundancy(model, graph, data)
    # Not the ridge, but the order: one of each pair is free, the other is not.
    assert scores["left"][[0, 3]].min() < 1e-6 < scores["left"][[0, 3]].max() * 1e-2
    assert scores["right"][[1, 4]].min() < 1e-6
    selection = {name: (score > 1e-6).nonzero().flatten() for name, score in scores.items() if (score <= 1e-6).any()}
    assert set(selection) == {"left", "right"} and len(selection["left"]) == 5 and len(selection["right"]) == 4
    before = model(data[0][0]).detach()
    with masked(model, graph, selection) as deleted:
        plain = (deleted(data[0][0]) - before).abs().max()
    for spatial in ("channels", "patches"):
        network = copy.deepcopy(model)
        repairs = redistribute(network, graph, selection, data, ridge=1e-9, spatial=spatial)
        assert [repair.parameter for repair in repairs] == ["both.weight"] and repairs[0].repaired < 1e-8
        apply(network, graph.shrink(selection))
        assert (network(data[0][0]) - before).abs().max() < 1e-5 < plain


def test_linear_combinations_across_flatten_and_through_grouped_readers():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5), nn.Linear(5, 2)
    ).eval()
    with torch.no_grad():  # channel 2 = 2 * channel 0 - channel 1, in both halves
        for base in (0, 4):
            model[0].weight[base + 2] = 2 * model[0].weight[base] - model[0].weight[base + 1]
            model[0].bias[base + 2] = 2 * model[0].bias[base] - model[0].bias[base + 1]
    duplicate(model[1], 3, 5)
    duplicate(model[1], 0, 2)
    data = [(torch.randn(40, 1, 4, 4), torch.zeros(40))]
    graph = trace(model, data[0][0][:1])
    before = model(data[0][0]).detach()
    selection = {"0": without(4, 2), "1": without(3, 2)}
    redistribute(model, graph, selection, data, ridge=1e-9)
    apply(model, graph.shrink(selection))
    assert (model(data[0][0]) - before).abs().max() < 1e-4


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from(["channels", "patches"]), st.booleans())
def test_it_is_never_worse_than_plain_deletion_and_the_best_there_is(seed, sequential, spatial, constant):
    torch.manual_seed(seed)
    model = Branches().eval()
    data = [(torch.randn(12, 2, 5, 4) + 0.3, torch.zeros(12)) for _ in range(2)]
    graph = trace(model, data[0][0][:1])
    selection = {"left": torch.randperm(6)[:3].sort().values, "both": torch.randperm(7)[:4].sort().values}
    options = {"sequential": sequential, "spatial": spatial, "constant": constant, "rows": 10_000}
    repairs = redistribute(model, graph, selection, data, **options)
    assert {repair.parameter for repair in repairs} == {"both.weight", "head.weight"}
    assert all(0 <= repair.repaired <= repair.plain * (1 + 1e-9) for repair in repairs)
    assert all((model.both.weight[:, unit] == 0).all() for unit in range(6) if unit not in selection["left"])


def test_the_error_it_states_is_the_one_that_is_measured(branches_and_data):
    model, data = branches_and_data
    graph = trace(model, data[0][0][:1])
    selection = {"both": torch.tensor([0, 2, 5])}
    before = model(data[0][0]).detach() - model.head.bias.detach()
    with masked(model, graph, selection):
        plain = model(data[0][0]).detach() - model.head.bias.detach()
    network = copy.deepcopy(model)
    (repair,) = redistribute(network, graph, selection, data, ridge=0.0 + 1e-12)
    with torch.no_grad():
        error = (network(data[0][0]) - model(data[0][0])).square().sum(1).mean() / before.square().sum(1).mean()
    assert repair.repaired == pytest.approx(float(error), rel=1e-3, abs=1e-9)
    expected = (plain - before).square().sum(1).mean() / before.square().sum(1).mean()
    assert repair.plain == pytest.approx(float(expected), rel=1e-4)


def test_layer_by_layer_makes_good_for_what_came_before(network, graph, batches):
    data = [(torch.randn(64, 1, 9, 8, generator=torch.Generator().manual_seed(7)), torch.zeros(64))]
    selection = {group.name: torch.arange(0, group.size, 2) for group in graph.groups}
    before = network(data[0][0]).detach()
    errors = {}
    with masked(network, graph, selection) as deleted, torch.no_grad():
        errors["plain"] = float((deleted(data[0][0]) - before).square().mean())
    for sequential in (False, True):
        repaired = copy.deepcopy(network)
        redistribute(repaired, graph, selection, data, sequential=sequential)
        apply(repaired, graph.shrink(selection))
        with torch.no_grad():
            errors[sequential] = float((repaired(data[0][0]) - before).square().mean())
    assert errors[True] < errors[False] < errors["plain"]


def test_attention_heads_hand_over_their_weights():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Tokens().eval()
    attention = model.attention
    with torch.no_grad():  # the last head says what the first says
        for part in range(3):
            for tensor in (attention.in_proj_weight, attention.in_proj_bias):
                tensor[12 * part + 8 : 12 * part + 12] = tensor[12 * part : 12 * part + 4]
    tokens = torch.randn(20, 5, 12)
    graph = trace(model, tokens[:1])
    data = [(tokens, torch.zeros(20))]
    scores = score_units("linear_redundancy", model, graph, data)["attention.in_proj_weight"]
    assert scores[[0, 2]].min() < 1e-5 < scores[[0, 2]].max() and scores[1] > 1e-3
    before = model(tokens).detach()
    redistribute(model, graph, {"attention.in_proj_weight": torch.tensor([0, 1])}, data, ridge=1e-9)
    apply(model, graph.shrink({"attention.in_proj_weight": torch.tensor([0, 1])}))
    assert (model(tokens) - before).abs().max() < 1e-5


def test_what_cannot_be_asked_for_is_named(branches_and_data):
    model, data = branches_and_data
    graph = trace(model, data[0][0][:1])
    for nothing in (None, []):
        with pytest.raises(UsageError, match="redistribution needs calibration"):
            redistribute(model, graph, {"left": torch.arange(3)}, nothing)
    with pytest.raises(UsageError, match="spatial='taps'"):
        redistribute(model, graph, {"left": torch.arange(3)}, data, spatial="taps")
    with pytest.raises(UsageError, match=r"rule = 'damge'.*'damage'"):
        score_units("linear_redundancy", model, graph, data, options={"rule": "damge"})
    weight = model.both.weight.detach().clone()
    assert redistribute(model, graph, {}, data) == () and torch.equal(model.both.weight, weight)
