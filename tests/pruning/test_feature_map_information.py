"""Information of feature maps: the estimators' limits, units that say nothing, blocks that can go."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import count
from convette.errors import BudgetError, StructureError, UsageError
from convette.models import create_model
from convette.pruning import feature_map_information, layer_information, redundant_layers, remove_layers
from convette.pruning.criteria.feature_map_information import (
    binned_information,
    distance_correlation,
    gram,
    renyi_entropy,
    renyi_information,
)
from convette.pruning.layer_removal import stage_ends
from convette.surgery import (
    apply,
    edit_from_json,
    removable_features,
    remove_features,
    replay,
    structure_log,
    trace,
)


def sample(seed: int, n: int = 60, d: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_entropy_lies_between_a_constant_and_strangers():
    x = sample(0)
    assert float(renyi_entropy(gram(torch.ones(20, 2)))) == pytest.approx(0, abs=1e-6)
    assert float(renyi_entropy(torch.eye(16, dtype=torch.float64) / 16)) == pytest.approx(4, abs=1e-9)
    assert 0 < float(renyi_entropy(gram(x))) < math.log2(60)
    values = torch.linalg.eigvalsh(gram(x)).clamp_min(1e-300)
    assert float(renyi_entropy(gram(x))) == pytest.approx(float(-(values * values.log2()).sum()), abs=5e-2)
    few = torch.arange(60).remainder(3).double()[:, None] * 100  # three places: both entropies are log2 3
    assert float(renyi_entropy(gram(few, 1.0))) == pytest.approx(math.log2(3), abs=1e-2)
    assert float(renyi_entropy(gram(x, 1e-3))) == pytest.approx(math.log2(60), abs=1e-6), "too narrow: all strangers"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_information_is_blind_to_order_place_and_direction(seed):
    x, y = sample(seed), sample(seed + 1)[:, :2] + sample(seed)[:, :2]
    turn = torch.linalg.qr(sample(seed, 3, 3))[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    for measure in (renyi_information, distance_correlation):
        value = measure(x, y)
        assert value > 0
        assert measure(x[order], y[order]) == pytest.approx(value, rel=1e-6)
        assert measure(x @ turn * 3 + 5, y) == pytest.approx(value, rel=1e-6)
        assert measure(y, x) == pytest.approx(value, rel=1e-6)


def test_what_depends_and_what_does_not():
    x = sample(0, 200, 1)
    assert distance_correlation(x, 3 * x - 1) == pytest.approx(1)
    assert distance_correlation(sample(1, 1000, 1), sample(2, 1000, 1)) < 0.1
    assert distance_correlation(x, torch.ones(200, 1, dtype=torch.float64)) == 0
    assert renyi_information(x, x**3) > 3 * renyi_information(x, sample(5, 200, 1))
    codes = torch.arange(200) % 4
    assert binned_information(codes, codes) == pytest.approx(2)
    assert binned_information(codes, torch.arange(200) // 4 % 5) == pytest.approx(0, abs=1e-9)


def test_information_about_itself_is_all_there_is_and_a_shuffle_leaves_little():
    # Far apart or the same: the Gram matrix is one of zeros and ones, whose square by entries is itself.
    places = (torch.arange(120) % 5).double()[:, None] * 100
    assert renyi_information(places, places, 1.0) == pytest.approx(float(renyi_entropy(gram(places, 1.0))), abs=1e-6)
    x = sample(7, 150, 2)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    for measure in (renyi_information, distance_correlation):
        null = measure(sample(8, 150, 2), x)  # of strangers, at this n and bandwidth
        assert measure(x, x[order]) == pytest.approx(null, abs=0.12) and measure(x, x) > 3 * measure(x, x[order])


def test_distance_correlation_by_brute_force():
    x, y = sample(3, 12, 2), sample(4, 12, 1)
    a = torch.tensor([[float((p - q).norm()) for q in x] for p in x])
    b = torch.tensor([[float((p - q).norm()) for q in y] for p in y])

    def centred(m):
        return m - m.mean(0) - m.mean(1, keepdim=True) + m.mean()

    a, b = centred(a), centred(b)
    brute = ((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()).sqrt()
    assert distance_correlation(x, y) == pytest.approx(float(brute), rel=1e-5)


@pytest.mark.parametrize("measure", ["renyi", "energy", "binned"])
@pytest.mark.parametrize("target", ["output", "label"])
def test_a_unit_that_says_the_class_is_worth_most_and_a_constant_nothing(measure, target):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.rand(90, 2, 5, 5, generator=generator)
    images[:, 0] = labels.view(-1, 1, 1) + 0.1 * images[:, 0]
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]])[:, :, None, None])
        model[0].bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
        model[2].weight.copy_(torch.tensor([[-3.0, 0.1, 0], [0, 0.1, 0], [3, 0.1, 0]])[:, :, None, None])
        model[2].bias.copy_(torch.tensor([2.0, 1.0, -4.0]))
    graph = trace(model, images[:1])
    scores = feature_map_information(model, graph, [(images, labels)], measure=measure, target=target)["0"]
    assert scores.argmax() == 0 and float(scores[2]) == pytest.approx(0, abs=1e-6) and scores[1] > 1e-3


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return create_model("resnet20", seed=0).eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(24, 3, 16, 16, generator=generator), torch.arange(24) % 10)]


@pytest.mark.parametrize("measure", ["renyi", "energy"])
@pytest.mark.parametrize("rule", ["value", "gain"])
def test_a_block_whose_branch_is_silent_is_worth_nothing(resnet, data, measure, rule):
    network = copy.deepcopy(resnet)
    with torch.no_grad():
        network.layer2[1].bn2.weight.zero_()
        network.layer2[1].bn2.bias.zero_()
    names = ["layer1.0", "layer2.1", "layer3.2"]
    scores = layer_information(network, names, data, measure=measure, rule=rule)
    assert scores["layer2.1"] == 0 and (rule == "gain" or min(scores["layer1.0"], scores["layer3.2"]) > 0)
    if rule == "value":
        before = network(data[0][0])
        found = remove_layers(network, data[0][0][:1], data, "macs<=95%", measure=measure)
        assert found.removed == ("layer2.1",) and torch.allclose(found.model(data[0][0]), before, atol=1e-5)
        assert isinstance(network.layer2[1].conv1, nn.Conv2d) and structure_log(found.model).edits


def test_blocks_go_until_the_budget_holds(resnet, data):
    example = data[0][0][:1]
    found = remove_layers(resnet, example, data, "parameters<=60%", keep=("layer3.2",), ends=True, measure="energy")
    before, after = count(resnet, example), count(found.model, example)
    assert after.parameters <= 0.6 * before.parameters and "layer3.2" not in found.removed
    assert set(found.scores) == set(found.removed) and len(set(found.removed)) == len(found.removed)
    assert found.model(data[0][0]).shape == (24, 10)


def test_first_and_last_blocks_of_stages_stay_unless_asked(resnet, data):
    example = data[0][0][:1]
    ends = set(stage_ends(resnet, example))
    assert {f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 2)} == ends
    found = remove_layers(resnet, example, data, "macs<=75%", measure="energy")
    assert found.removed and set(found.removed) <= {"layer1.1", "layer2.1", "layer3.1"}


def test_layers_below_a_threshold_or_like_the_one_before_are_called_redundant(resnet, data):
    layers = ("layer1.0", "layer1.1", "layer1.2")
    network = copy.deepcopy(resnet)
    with torch.no_grad():
        network.layer1[1].bn2.weight.zero_()
        network.layer1[1].bn2.bias.zero_()
    assert redundant_layers(network, layers, data, low=1e-6, alike=2.0) == ("layer1.1",)
    assert redundant_layers(network, layers, data, low=float("inf")) == layers
    assert redundant_layers(network, layers, data, low=-1.0, alike=2.0) == ()
    # Everything counts as alike and no gain as enough: all but the first, which has none before it.
    assert redundant_layers(network, layers, data, low=-1.0, alike=-1.0, gain=float("inf")) == layers[1:]


@pytest.fixture(scope="module")
def densenet():
    """DenseNet-BC (L=100, k=12) for CIFAR-10."""
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    network = DenseNet(12, (16, 16, 16), 24, bn_size=4, num_classes=10)
    network.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    network.features.norm0 = network.features.relu0 = network.features.pool0 = nn.Identity()
    return network.eval()


def test_a_dense_layer_goes_with_its_columns_and_nothing_else(densenet):
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = count(densenet, example)
    assert before.parameters == 769_162 and before.macs == pytest.approx(288e6, rel=1e-3)
    graph = trace(densenet, example)
    names = removable_features(densenet, graph)
    assert len(names) == 48
    place = 5
    network, layer = copy.deepcopy(densenet), densenet.get_submodule(names[place])
    own = sum(parameter.numel() for parameter in layer.parameters())
    # Twelve columns of the 1x1 convolution (48 outputs) and twelve norms of each of the ten later layers, and of the
    # transition (384 channels read there were 24 + 16 * 12 = 216, of which it makes 108).
    columns = 10 * (12 * 48 + 2 * 12) + (12 * 108 + 2 * 12)
    apply(network, *remove_features(network, names[place], graph))
    assert before.parameters - count(network, example).parameters == own + columns
    with torch.no_grad():  # the same as a layer that says nothing: its columns read zero
        reference = copy.deepcopy(densenet)
        for member in next(g for g in graph if g.of("producer")[0].module.startswith(f"{names[place]}.")).members:
            if member.role == "consumer":
                weight = reference.get_parameter(member.parameter)
                weight.index_fill_(member.dim, member.index.flatten(), 0)
        assert torch.allclose(network(example), reference(example), atol=1e-5)
    assert edit_from_json(structure_log(network).edits[0].to_json()) == structure_log(network).edits[0]
    again = replay(copy.deepcopy(densenet), structure_log(network).edits)
    assert torch.equal(again(example), network(example))


def test_dense_layers_go_until_the_budget_holds():
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    network = DenseNet(4, (4, 4), 8, bn_size=2, num_classes=10).eval()
    images = torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        network.features.denseblock1.denselayer3.conv2.weight.zero_()
    batches = [(images, torch.arange(12) % 10)]
    scores = layer_information(
        network, ["features.denseblock1.denselayer2", "features.denseblock1.denselayer3"], batches
    )
    assert scores["features.denseblock1.denselayer3"] == 0 < scores["features.denseblock1.denselayer2"]
    found = remove_layers(network, images[:1], batches, "parameters<=85%")
    assert found.removed[0] == "features.denseblock1.denselayer3"
    assert count(found.model, images[:1]).parameters <= 0.85 * count(network, images[:1]).parameters
    assert {name[-1] for name in found.removed} <= {"2", "3"} and found.model(images).shape == (12, 10)


def test_what_cannot_be_asked_for_is_named(resnet, data):
    example = data[0][0][:1]
    with pytest.raises(BudgetError, match=r"no block is left.*ends=True"):
        remove_layers(resnet, example, data, "macs<=1%", measure="energy")
    with pytest.raises(UsageError, match="does not measure"):
        remove_layers(resnet, example, data, "latency<=50%")
    with pytest.raises(StructureError, match=r"layer2\.0"):
        layer_information(resnet, ["layer2.0"], data)
    with pytest.raises(UsageError, match="needs calibration"):
        layer_information(resnet, ["layer1.0"], None)
    with pytest.raises(UsageError, match="bandwidth=0"):
        layer_information(resnet, ["layer1.0"], data, bandwidth=0)
    with pytest.raises(UsageError, match="gain"):
        layer_information(resnet, ["layer1.0"], data, measure="binned", rule="gain")
