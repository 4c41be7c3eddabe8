import copy

import pytest
import torch
from torch import nn

from convette.errors import StructureError, UsageError
from convette.layers.quantization import BinaryConv2d
from convette.models import create_model
from convette.pruning.main_subsidiary import (
    SubsidiarySettings,
    gate,
    gated,
    greedy_filters,
    learn_gates,
    main_subsidiary,
    open_units,
    prunable_groups,
    removed_figures,
    subsidiary,
)
from convette.surgery import apply, trace
from convette.training import TrainSettings

QUICK = TrainSettings(batch_size=128, learning_rate=0.02, augmentation=(), precision="fp32")


def binary(scale: str = "mean", padding_value: int = -1) -> nn.Module:
    torch.manual_seed(0)
    given = {"scale": scale, "padding_value": padding_value}
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        BinaryConv2d(8, 12, 3, padding=1, **given),
        nn.BatchNorm2d(12),
        BinaryConv2d(12, 10, 3, padding=1, stride=2, **given),
        nn.BatchNorm2d(10),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 10),
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.3)
    return model


EXAMPLE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding_value", [-1, 0])
def test_the_gated_network_is_the_pruned_one(padding_value):
    model = binary("mean", padding_value)
    graph = trace(model, EXAMPLE)
    assert prunable_groups(model, graph) == ["2", "4"]
    kept = {"2": torch.tensor([0, 2, 3, 7, 11]), "4": torch.tensor([1, 4, 9])}
    gates = {name: torch.zeros(graph[name].size).index_fill(0, units, 1.0) for name, units in kept.items()}
    with torch.no_grad(), gated(model, graph, gates):
        masked = model(EXAMPLE)
    pruned = copy.deepcopy(model)
    apply(pruned, graph.shrink(kept))
    with torch.no_grad():
        assert torch.allclose(masked, pruned(EXAMPLE), atol=1e-5)
        opened = {name: torch.ones(graph[name].size) for name in kept}
        before = model(EXAMPLE)
        with gated(model, graph, opened):
            assert torch.allclose(model(EXAMPLE), before, atol=1e-6)
        assert torch.equal(model(EXAMPLE), before)


def test_a_gate_is_hard_and_its_gradient_goes_straight_through_inside():
    scores = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    opened = gate(scores)
    assert opened.tolist() == [0, 0, 0, 1, 1]
    opened.backward(torch.arange(5.0) + 1)
    assert scores.grad.tolist() == [0, 2, 3, 4, 0]


def test_all_binary_filters_have_one_norm():
    model = binary("one")
    norms = model[2].signs().flatten(1).norm(dim=1)
    assert torch.allclose(norms, norms[0].expand_as(norms)) and float(norms[0]) ** 2 == pytest.approx(8 * 9)


def test_learning_masks_leaves_the_network_alone_and_sparsity_alone_closes_all(digits):
    model = binary()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, EXAMPLE)
    labels = torch.tensor([0, 1, 2, 3])

    def batches(epoch):
        return iter([(EXAMPLE, labels)])

    scores = learn_gates(model, graph, ["2"], batches, 40, 0.01, strength=1.0, task=0.0)
    assert set(scores) == {"2"} and (scores["2"] <= 0).all()
    assert len(open_units(scores["2"], least=2)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    counts = [
        len(open_units(learn_gates(model, graph, ["2"], batches, 40, 0.01, strength=s, task=0.0)["2"]))
        for s in (0.0, 1e-6, 1.0)
    ]
    assert counts[0] == 12 and counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("order", ["bottom_up", "joint"])
def test_filters_go_layer_by_layer_and_the_network_learns_between(digits, order):
    model = binary()
    choices = SubsidiarySettings(
        strength=0.5,
        mask_epochs=2,
        mask_rate=5e-3,
        retrain_epochs=1,
        final_epochs=1,
        order=order,
        batch_size=128,
        least=2,
    )
    found = main_subsidiary(model, digits, choices, train_settings=QUICK)
    assert set(found.kept) == {"2", "4"} and len(found.accuracies) == (2 if order == "bottom_up" else 1)
    assert found.model[2].out_channels == found.kept["2"][1] >= 2
    assert found.filters[1] < found.filters[0] == 22 and model[2].out_channels == 12
    assert found.model[0].out_channels == 8  # the real first convolution is left alone
    figures = removed_figures(model, found.model, EXAMPLE[:1])
    assert figures["parameters"][1] < figures["parameters"][0]


def test_published_accounting_of_the_filters_of_resnet18():
    model = create_model("birealnet18", seed=0).eval()
    filters = sum(m.out_channels for m in model.modules() if isinstance(m, BinaryConv2d))
    assert filters == 4 * (64 + 128 + 256 + 512) == 3840 and round(0.786 * filters) == 3018


def test_as_a_criterion_it_scores_real_networks_too(network, graph, batches):
    scores = subsidiary(network, graph, batches, epochs=3)
    assert set(scores) == {group.name for group in graph.groups}
    with pytest.raises(UsageError, match="subsidiary"):
        subsidiary(network, graph, None)


def test_what_cannot_be_is_refused(digits):
    for wrong in ({"strength": -1.0}, {"mask_rate": 0.0}, {"mask_epochs": 0}, {"final_epochs": -1}):
        with pytest.raises(UsageError):
            SubsidiarySettings(**wrong)
    with pytest.raises(StructureError, match="no group"):
        main_subsidiary(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)


def few(seed: int = 0):
    labels = torch.tensor([0, 1, 2, 3])
    return lambda epoch: iter([(EXAMPLE, labels)])


def test_open_gates_are_the_network_bit_for_bit_and_removal_is_exact_on_integers():
    model = binary("one")
    graph = trace(model, EXAMPLE)
    with torch.no_grad():
        before = model(EXAMPLE)
        with gated(model, graph, {name: torch.ones(graph[name].size) for name in ("2", "4")}):
            assert torch.equal(model(EXAMPLE), before)
        kept = torch.tensor([0, 2, 3, 7, 11])
        with gated(model, graph, {"2": torch.zeros(12).index_fill(0, kept, 1.0)}):
            masked = model[:5](EXAMPLE)
        pruned = copy.deepcopy(model)
        apply(pruned, graph.shrink({"2": kept}))
        assert torch.equal(pruned[:5](EXAMPLE), masked), "sums of plus and minus one are exact"


def test_a_score_may_be_the_mean_of_a_tensor_of_the_weights_shape():
    model = binary()
    graph = trace(model, EXAMPLE)
    start = learn_gates(model, graph, ["2"], few(), 0, 0.01, strength=1.0, identity="weights")["2"]
    assert start.shape == (12,) and ((start - 0.05).abs() < 0.02).all()  # the mean of 72 from U(0, 0.1)
    closed = learn_gates(model, graph, ["2"], few(), 40, 0.01, strength=1.0, task=0.0, identity="weights")["2"]
    assert (closed <= 0).all()


def test_norms_learn_with_the_gates_if_asked_and_nothing_else_does():
    model = binary()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn_gates(model, trace(model, EXAMPLE), ["2"], few(), 2, 0.01, strength=0.1, norms=True)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.weight", "3.bias"}


def test_the_greedy_rule_removes_what_is_missed_least_each_time():
    model = binary()
    graph, labels = trace(model, EXAMPLE), torch.tensor([0, 1, 2, 3])
    scores = greedy_filters(model, graph, "4", [(EXAMPLE, labels)], 8)
    assert sorted(scores.tolist()) == [0.0, 1.0, *[10.0] * 8]

    def loss(gone):
        kept = torch.ones(10).index_fill(0, torch.tensor(gone), 0.0)
        with torch.no_grad(), gated(model, graph, {"4": kept}):
            return float(nn.functional.cross_entropy(model(EXAMPLE), labels))

    first = int(scores.argmin())
    assert loss([first]) == min(loss([unit]) for unit in range(10))
    second = int((scores == 1).nonzero())
    assert loss([first, second]) == min(loss([first, unit]) for unit in range(10) if unit != first)


@pytest.mark.parametrize("rule", ["learned", "greedy", "l1", "random"])
def test_a_share_is_kept_by_any_rule(digits, rule):
    settings = SubsidiarySettings(
        share=0.5,
        rule=rule,
        mask_epochs=1,
        retrain_epochs=0,
        final_epochs=0,
        batch_size=16 if rule == "greedy" else 256,
    )
    found = main_subsidiary(binary(), digits, settings)
    assert found.kept == {"2": (12, 6), "4": (10, 5)}
    for wrong in ({"share": 0.0}, {"rule": "l1"}):
        with pytest.raises(UsageError, match="share"):
            SubsidiarySettings(**wrong)
