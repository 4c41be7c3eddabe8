import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tests.cost.test_latency_table import macs_timer
from torch import nn

from convette.cost import Cost, LatencyCost, Limit, WidthCost, count, measure_table
from convette.errors import BudgetError, UsageError
from convette.pruning import PruneSettings, WidthRules, prune, random, score_units
from convette.pruning.hardware_aware_filter_pruning import information_gain, opti_cut
from convette.runtime import Latency
from convette.surgery import apply, masked, trace


def limit(metric: str, value: float) -> Limit:
    return Limit(metric=metric, percentile=None, value=float(value), relative=False, engine=None)


@pytest.mark.parametrize("mode", ["fisher", "exact"])
def test_gains_are_not_negative_and_zero_where_nobody_listens(network, graph, batches, mode):
    with torch.no_grad():
        network.outer.weight[:, 3] = 0
    scores = information_gain(network, graph, batches, mode=mode)
    assert set(scores) == {group.name for group in graph.groups}
    assert all((score >= 0).all() for score in scores.values())
    assert scores["inner"][3] == 0
    assert (scores["inner"][[0, 1, 2]] > 0).all()


def test_exact_is_the_divergence_of_the_masked_network(network, graph, batches):
    scores = information_gain(network, graph, batches, mode="exact")
    images = torch.cat([x for x, _ in batches])
    kept = torch.tensor([unit for unit in range(12) if unit != 5])
    with torch.no_grad():
        whole = network(images).log_softmax(1)
        with masked(network, graph, {"inner": kept}) as without:
            less = without(images).log_softmax(1)
    expected = (whole.exp() * (whole - less)).sum(1).mean()
    assert float(scores["inner"][5]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


class Twin(nn.Module):
    """Two units that can be made one unit told twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_halving_a_duplicated_filter_quarters_its_gain():
    torch.manual_seed(0)
    one, two = Twin().eval(), Twin().eval()
    two.load_state_dict(one.state_dict())
    x = torch.randn(40, 6)
    with torch.no_grad():
        # Unit 3 becomes a copy of unit 2, and each is listened to half as much; before, 3 said nothing.
        one.second.weight[:, 3] = 0
        two.first.weight[3], two.first.bias[3] = two.first.weight[2], two.first.bias[2]
        two.second.weight[:, 2] = one.second.weight[:, 2] / 2
        two.second.weight[:, 3] = one.second.weight[:, 2] / 2
    assert torch.allclose(one(x), two(x), atol=1e-6)
    labels = torch.zeros(40, dtype=torch.int64)
    single = information_gain(one, trace(one, x[:1]), [(x, labels)])["first"]
    double = information_gain(two, trace(two, x[:1]), [(x, labels)])["first"]
    assert torch.allclose(double[2:], single[2].expand(2) / 4, rtol=1e-3)


def test_fisher_ranks_like_exact_on_a_trained_network_and_does_not_see_constants():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    model.eval()
    graph, batch = trace(model, x[:1]), [(x[1000:1500], y[1000:1500])]
    fisher = information_gain(model, graph, batch, temperature=2.0)["0"]
    exact = information_gain(model, graph, batch, mode="exact", temperature=2.0)["0"]
    assert spearmanr(fisher, exact)[0] >= 0.7
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[2].bias += 3.0
    assert torch.allclose(information_gain(shifted, graph, batch, mode="exact", temperature=2.0)["0"], exact, atol=1e-4)


def test_the_network_is_left_as_it_was(network, graph, batches):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    network.stem.weight.requires_grad_(False)
    information_gain(network, graph, batches)
    assert network.training and not network.stem.weight.requires_grad and network.outer.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_choices_that_cannot_be_are_refused(network, graph, batches):
    for options, calibration in (({"mode": "x"}, batches), ({"temperature": 0.0}, batches), ({}, None)):
        with pytest.raises(UsageError, match="information_gain"):
            score_units("information_gain", network, graph, calibration, options=options)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.2, 0.95), seed=st.integers(0, 99), per_cost=st.booleans(), use_table=st.booleans())
def test_the_limit_holds_and_nothing_fits_any_more(network, graph, example, share, seed, per_cost, use_table):
    if use_table:
        table = measure_table(network, example, timer=macs_timer(1e-3), points=4)
        cost, metric = LatencyCost(network, example, graph, table), "latency"
    else:
        cost, metric = WidthCost(network, example, graph), "macs"
    figure = getattr(cost, metric)
    bound = share * figure({})
    scores = random(network, graph, seed=seed)
    rules = WidthRules(multiple_of=2)
    selection = opti_cut(scores, graph, cost, limit(metric, bound), rules=rules, per_cost=per_cost)
    graph.check(selection)
    assert figure(selection) <= bound
    for group in graph.groups:
        kept = selection.get(group.name, torch.arange(group.size))
        assert len(kept) % 2 == 0
        gone = sorted(set(range(group.size)) - set(kept.tolist()), key=lambda u: -float(scores[group.name][u]))[:2]
        if gone:
            assert figure({**selection, group.name: torch.tensor(sorted([*kept.tolist(), *gone]))}) > bound


def test_with_macs_for_time_it_meets_a_budget_of_macs_within_a_unit(network, graph, example):
    table = measure_table(network, example, timer=macs_timer(), points=4)
    latency, macs = LatencyCost(network, example, graph, table), WidthCost(network, example, graph)
    scores, half = random(network, graph, seed=0), 0.5 * macs.macs({})
    by_table = opti_cut(scores, graph, latency, limit("latency", half))
    shrunk = copy.deepcopy(network)
    apply(shrunk, graph.shrink(by_table))
    assert macs.macs(by_table) == pytest.approx(half, rel=0.08) and macs.macs(by_table) <= half * (1 + 1e-9)


def test_a_staircase_is_left_alone_until_a_whole_step_is_paid_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
    example = torch.randn(1, 1, 1, 1)
    graph = trace(model, example)

    class Steps(WidthCost):
        """The first layer costs by whole eights, the second by units."""

        def predict(self, metric, widths):
            first, second = widths[..., 0].double(), widths[..., 1].double()
            return torch.ceil(first / 8) * 8 + second if metric == "macs" else super().predict(metric, widths)

        def macs(self, selection):
            return float(self.predict("macs", self.widths(selection)[None])[0])

    cost = Steps(model, example, graph)
    scores = {group.name: torch.full((16,), 1.0 if group.name == cost.groups[0] else 1.2) for group in graph.groups}
    few = opti_cut(scores, graph, cost, limit("macs", 30))
    assert cost.groups[0] not in few and len(few[cost.groups[1]]) == 14
    many = opti_cut(scores, graph, cost, limit("macs", 22))
    assert len(many[cost.groups[0]]) == 8 and len(many[cost.groups[1]]) == 14


def test_what_cannot_be_reached_is_said_in_milliseconds(network, graph, example):
    table = measure_table(network, example, timer=macs_timer(1e-3), points=3)
    cost = LatencyCost(network, example, graph, table)
    with pytest.raises(BudgetError, match="by the latency table the smallest network takes"):
        opti_cut(random(network, graph), graph, cost, limit("latency", 1e-3))


def fake_latency(value: float) -> Latency:
    return Latency("eager:cpu", "cpu", "fp32", 1, 1, 50, value, value, value, value, (value, value), 0.0, 0.0, (value,))


def test_prune_spends_milliseconds_of_the_table(network, example, monkeypatch, tmp_path):
    from convette.pruning import _predicting

    monkeypatch.setattr(_predicting, "measure_table", lambda n, e, engine: measure_table(n, e, timer=macs_timer(1e-3)))
    monkeypatch.setattr(_predicting, "calibrate_table", lambda table, *rest: table)

    def measured(networks, example, engine):
        # What is measured is 30 % more than the table says.
        return {name: fake_latency(1.3e-3 * count(n, example).macs) for name, n in networks.items()}

    choices = PruneSettings(steps=2, epochs=0, allocation="opti_cut", predictor="latency_table")
    result = prune(network, example, "latency<=50%", choices, measure=measured, checkpoint_dir=tmp_path)
    assert result.met and isinstance(result.end, Cost)
    assert 0.35 < result.end.macs / result.start.macs <= 0.5
    assert (tmp_path / "latency-table.json").exists()
    again = prune(network, example, "latency<=50%", choices, measure=measured, checkpoint_dir=tmp_path)
    assert again.widths == result.widths
    with pytest.raises(UsageError, match="opti_cut"):
        PruneSettings(predictor="latency_table", allocation="exact")
