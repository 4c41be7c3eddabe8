import copy

import pytest
import torch
from tests.pruning.conftest import plain

from convette import models
from convette.cost import LatencyCost, Limit, count, measure_table
from convette.data import load_data
from convette.errors import FileFormatError, UsageError
from convette.pruning import l1 as magnitude
from convette.pruning.allocation import build_ladders
from convette.pruning.allocation._search import predicted
from convette.pruning.transformable_architecture_search import (
    SearchResNet,
    Shape,
    ShapedResNet,
    TASSettings,
    budget_loss,
    channel_interpolation,
    depth_choices,
    depth_probabilities,
    search,
    shape_macs,
    two_choices,
    width_choices,
)
from convette.pruning.transformable_architecture_search.allocation import _Search, differentiable_widths
from convette.surgery import Origin, apply, trace

THREE, FIVE = (3, 3, 3), (5, 5, 5)
RESNET20 = Shape((3, 16, 6, 4, 4, 4, 4, 4, 32, 32, 12, 19, 32, 28, 64, 64, 64, 64, 64, 44), THREE, THREE)
RESNET32 = Shape(
    (3, 16, 6, 4, 12, 4, 4, 16, 9, 9, 6, 14, 32, 32, 9, 19, 28, 9, 32, 19, 32, 9, *[64] * 7, 32, 38, 32),
    FIVE,
    FIVE,
)
WHOLE20 = Shape((3, 16, *[16] * 6, *[32] * 6, *[64] * 6), THREE, THREE)


@pytest.mark.parametrize(
    ("shape", "macs", "parameters"),
    [(RESNET20, 22_444_472, 228_130), (RESNET32, 34_945_344, 320_539), (WHOLE20, 40_813_184, 272_282)],
)
def test_published_shapes_have_the_published_counts(shape, macs, parameters):
    model, example = ShapedResNet(shape).eval(), torch.zeros(1, 3, 32, 32)
    found = count(model, example)
    assert found.macs == macs == shape_macs(shape, 32)
    assert found.parameters == parameters


@pytest.mark.parametrize("slow", [1.0, 20.0])
def test_a_latency_limit_is_learned_from_the_table(few, slow):
    """With a table that counts MACs the gradient is that of the MACs; a slow layer is narrowed more than they say."""

    def timer(networks, engine):
        def seconds(network, x):
            first = any(m.in_channels == 1 for m in network.modules() if isinstance(m, torch.nn.Conv2d))
            return (slow if first else 1.0) * count(network, x).macs / 1e4

        return {name: (value := seconds(*one), value, value) for name, one in networks.items()}

    network, example = plain(few).eval(), few.preprocessing(few.train.images([0]))
    graph = trace(network, example)
    cost = LatencyCost(network, example, graph, measure_table(network, example, timer=timer, points=2))
    scores = magnitude(network, graph)
    slopes = {}
    for metric in ("latency", "macs"):
        limit = Limit(metric, None, 0.5 * float(predicted(cost, metric, {})), False, None)
        found = _Search(build_ladders(scores, graph), graph, cost, [limit], 0.9, 0)
        found._budget().backward()
        slopes[metric] = found.logits.grad
        selection = differentiable_widths(scores, graph, cost, limit, loss=lambda kept: 1.0, steps=3)
        assert 0.4 * float(limit.value) < predicted(cost, metric, selection) <= float(limit.value)
    by_time, by_macs = (slopes[metric].abs().sum(1) for metric in ("latency", "macs"))
    if slow == 1:
        assert torch.allclose(slopes["latency"], slopes["macs"], rtol=0.02, atol=1e-4)
        assert by_macs.min() > 1e-2
    else:
        assert by_time[0] / by_time[1] > 2 * by_macs[0] / by_macs[1]


def test_widths_and_depths_are_the_published_ones():
    assert width_choices(16) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert width_choices(32) == (9, 12, 16, 19, 22, 25, 28, 32)
    assert width_choices(64) == (19, 25, 32, 38, 44, 51, 57, 64)
    assert [depth_choices(n) for n in (2, 3, 5, 6)] == [(1, 2), (1, 2, 3), (1, 3, 5), (1, 3, 5, 6)]


def test_interpolation_is_a_mean_over_neighbours():
    x = torch.randn(2, 4, 3, 3)
    assert channel_interpolation(x, 4) is x
    assert torch.allclose(channel_interpolation(x, 2), x.view(2, 2, 2, 3, 3).mean(2), atol=1e-6)
    assert torch.allclose(channel_interpolation(x, 1).mean(1), x.mean(1), atol=1e-6)
    seven = channel_interpolation(torch.arange(4.0).view(1, 4, 1, 1), 7).flatten()
    assert seven[0] == 0 and seven[-1] == 3 and len(seven) == 7


def test_two_choices_differ_mix_to_one_and_carry_the_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(8, requires_grad=True)
    for temperature in (5.0, 0.1, 1e-3):
        for _ in range(30):
            (one, other), weights = two_choices(logits, temperature, generator)
            assert one != other and float(weights.detach().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights.detach().max()) > 0.999
    _, weights = two_choices(logits, 5.0, generator)
    weights[0].backward()
    assert logits.grad is not None and int((logits.grad != 0).sum()) >= 2
    with pytest.raises(UsageError):
        two_choices(torch.zeros(1), 1.0)


def test_the_budget_pushes_the_right_way_and_rests_in_its_band():
    net = SearchResNet(2, (8, 8, 8), in_channels=1)
    expected = net.expected_macs(8)
    gradients = {}
    for reached in (2.0, 0.97, 0.5):
        net.zero_grad()
        loss = budget_loss(expected, reached, 1.0, 1.0)
        if reached == 0.97:
            assert float(loss) == 0
            continue
        (gradient,) = torch.autograd.grad(loss, net.width_logits, retain_graph=True)
        # Along the descent, do the narrow widths gain (too costly), or the wide ones (too cheap)?
        gradients[reached] = float((-gradient[:, 0] + gradient[:, -1]).sum())
    assert gradients[2.0] > 0 > gradients[0.5]


def test_depths_are_reached_with_falling_probability():
    chances = depth_probabilities(torch.tensor([0.3, 1.0, -0.5]), 5)
    assert float(chances[0]) == pytest.approx(1.0)
    assert (chances.diff() <= 1e-7).all()
    assert float(chances[4]) == pytest.approx(float(torch.tensor([0.3, 1.0, -0.5]).softmax(0)[2]))


def test_the_expected_cost_of_a_sure_shape_is_its_cost():
    net = SearchResNet(3)
    with torch.no_grad():
        net.width_logits.zero_()[:, -1] = 50
        net.depth_logits.zero_()[:, -1] = 50
    assert net.shape() == WHOLE20 == net.whole()
    assert float(net.expected_macs(32).detach()) == pytest.approx(net.macs(32), rel=1e-5)


def test_a_dropped_block_keeps_its_entries():
    shorter = Shape(RESNET20.channels, (1, 2, 3), THREE)
    assert [layer[:3] for layer in shorter.layers()] == [
        (16, 6, 4),
        (4, 32, 32),
        (32, 12, 19),
        (19, 64, 64),
        (64, 64, 64),
        (64, 64, 44),
    ]
    assert ShapedResNet(shorter)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(UsageError, match="widths for"):
        Shape((3, 16, 16), THREE, THREE)
    with pytest.raises(UsageError, match="depths"):
        Shape(RESNET20.channels, (0, 2, 3), THREE)


def test_a_shaped_network_is_saved_cut_saved_again_and_read_back(tmp_path):
    model = ShapedResNet(Shape((1, 4, 6, 4, 8, 8), (1, 1), (1, 1)), 7).eval()
    x = torch.randn(2, 1, 8, 8)
    models.save(model, tmp_path / "a.safetensors")
    again = models.load(tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))
    graph = trace(again, x[:1])
    apply(again, graph.shrink({graph.groups[0].name: torch.arange(graph.groups[0].size - 1)}))
    models.save(again, tmp_path / "b.safetensors")
    assert torch.equal(models.load(tmp_path / "b.safetensors")(x), again(x))
    assert count(models.create_model("shaped_resnet").eval(), torch.zeros(1, 3, 32, 32)).macs == 22_444_472
    for wrong in ({"channels": [4, 4]}, {"channels": [0] * 19}, {"channels": "16"}, {"kept": [9, 9, 9]}):
        with pytest.raises(FileFormatError, match="shaped_resnet"):
            models.build_from_origin(Origin("convette:shaped_resnet", wrong))


def test_a_search_moves_towards_its_target_and_is_the_same_again():
    data = load_data("digits")
    settings = TASSettings(macs=0.3, blocks=2, widths=(8, 8, 16), epochs=2, batch_size=128, size_rate=0.2)
    found = search(data, settings)
    assert len(found.history) == 2 and found.macs < 0.7 * found.whole_macs
    example = data.preprocessing(data.train.images([0]))
    assert count(copy.deepcopy(found.model).eval(), example).macs == found.macs
    assert search(data, settings).shape == found.shape
    for wrong in ({"macs": 0.0}, {"epochs": 0}):
        with pytest.raises(UsageError):
            TASSettings(**wrong)
