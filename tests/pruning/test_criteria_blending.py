"""Blending criteria: clusters by rank, factors from a probe, and an evolution that never falls behind its singles."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from convette.errors import UsageError
from convette.pruning import blend, blend_search, criteria_agreement, score_units
from convette.pruning.criteria.criteria_blending import _factors, _Group, cluster_criteria
from convette.surgery import trace

FEW = {"pool": "l1, l2, taylor, apoz", "generations": 2, "population": 6, "probe": 3}


def test_equal_orders_are_one_cluster_whatever_their_scale():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(20, generator=generator) for _ in range(3))
    scores = {"a": a, "grown": a.exp() * 7, "b": b, "c": c, "back": -a}
    agreement = criteria_agreement(scores)
    assert agreement[0, 1] == pytest.approx(1) and agreement[0, 4] == pytest.approx(-1)
    assert np.allclose(agreement, agreement.T) and (np.abs(agreement) <= 1 + 1e-9).all()
    assert agreement[0, 2] == pytest.approx(spearmanr(a, b).statistic)
    for count in (1, 2, 3, 4):
        found = cluster_criteria(agreement, count)
        assert sorted(k for cluster in found for k in cluster) == list(range(5)) and len(found) <= count
        assert any({0, 1} <= set(cluster) for cluster in found)


def test_l1_and_l2_agree_on_gaussian_filters():
    filters = torch.randn(64, 144, generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(0.5, 1.5, 64)[:, None]
    filters = filters * spread
    assert criteria_agreement({"l1": filters.abs().sum(1), "l2": filters.norm(dim=1)})[0, 1] > 0.95


def test_a_criterion_that_predicts_the_wrong_way_is_dropped_not_turned():
    losses = np.array([0.1, 0.3, 0.2, 0.7])
    ranks = np.array([[1.0, 3, 2, 4], [4, 2, 3, 1], [1, 1, 1, 1]])
    assert _factors(ranks, losses).tolist() == pytest.approx([1.0, 0.0, 0.05])
    group = _Group(["good", "bad", "flat"], ranks / 4, [[0], [1], [2]], _factors(ranks, losses))
    shares = group.shares(group.plain())
    assert shares[1] == 0 and shares.sum() == pytest.approx(1) and shares[0] > shares[2]
    assert group.shares(group.pure("bad")).tolist() == [0, 1, 0], "asked for alone, it is given"


def test_one_criterion_in_the_pool_is_that_criterion(network, graph, batches):
    scores = score_units("taylor", network, graph, batches)
    for generations in (0, 1):
        mixed = blend(network, graph, batches, pool="taylor", generations=generations, population=2, probe=0)
        for name, score in mixed.items():
            assert torch.equal(score.argsort(stable=True), scores[name].argsort(stable=True))
            assert 0 < score.min() <= score.max() == 1


def test_evolution_is_no_worse_than_any_single_and_never_forgets(network, graph, batches):
    found = blend_search(network, graph, batches, **FEW)
    assert list(found.fitness) == sorted(found.fitness) and len(found.fitness) == 3
    assert set(found.singles) == {"l1", "l2", "taylor", "apoz"}
    assert found.fitness[-1] >= max(found.singles.values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.shares.values())
    assert all({k for c in sets for k in c} >= set(found.shares[name]) for name, sets in found.clusters.items())
    again = blend_search(network, graph, batches, **FEW)
    assert all(torch.equal(again.scores[name], score) for name, score in found.scores.items())


def test_it_follows_the_units(network, graph, batches):
    options = {"pool": "l1, taylor, apoz", "generations": 0, "probe": 0}
    before = blend(network, graph, batches, **options)["inner"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.inner.weight.copy_(network.inner.weight[order])
        norm = network.inner_norm
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order])
        network.outer.weight.copy_(network.outer.weight[:, order])
    assert torch.allclose(blend(network, graph, batches, **options)["inner"], before[order], atol=1e-6)


def test_as_many_clusters_as_part_best():
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(60, generator=generator) for _ in range(3)]
    scores = {
        f"{k}{copy}": base + 0.05 * torch.randn(60, generator=generator)
        for k, base in enumerate(bases)
        for copy in range(3)
    }
    assert sorted(cluster_criteria(criteria_agreement(scores), 0)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(cluster_criteria(criteria_agreement({"a": bases[0], "b": bases[1]}), 0)) == 2


def test_growing_transforms_change_neither_clusters_nor_the_blend_of_ranks(network, graph, batches, monkeypatch):
    from convette.pruning import criteria

    options = {"pool": "l1, taylor, apoz, l2", "generations": 0, "probe": 3}
    before = blend_search(network, graph, batches, **options)
    summed = blend_search(network, graph, batches, **options, scale="sum")
    plain = criteria.score_units

    def grown(name, *args, **given):
        found = plain(name, *args, **given)
        return {g: (s / s.abs().amax()).double().exp() * 7 + 1 if name == "l1" else s for g, s in found.items()}

    monkeypatch.setattr(criteria, "score_units", grown)
    after = blend_search(network, graph, batches, **options)
    assert after.clusters == before.clusters and after.shares == before.shares
    assert all(torch.equal(after.scores[name], score) for name, score in before.scores.items())
    other = blend_search(network, graph, batches, **options, scale="sum")
    assert any(not torch.allclose(other.scores[name], score) for name, score in summed.scores.items())


def test_fitness_may_be_the_accuracy(network, graph, batches):
    found = blend_search(network, graph, batches, **FEW, fitness="accuracy")
    assert all(0 <= value <= 1 for value in (*found.fitness, *found.singles.values()))
    assert found.fitness[-1] >= max(found.singles.values())
    for wrong in ({"fitness": "f1"}, {"scale": "log"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            score_units("blend", network, graph, batches, options=wrong)


def test_what_cannot_be_asked_for_is_named(network, graph, batches):
    with pytest.raises(UsageError, match=r"criterion 'tailor'.*'taylor'"):
        blend(network, graph, batches, pool="l1, tailor")
    with pytest.raises(UsageError, match="own pool"):
        blend(network, graph, batches, pool="blend")
    with pytest.raises(UsageError, match="population=1"):
        blend(network, graph, batches, population=1)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"no criterion of the pool.*bn_scale"):
        blend(
            plain,
            trace(plain, torch.ones(1, 3)),
            [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))],
            pool="bn_scale",
        )
