"""Predicted costs of real networks against counts of what the room of surgery cuts them to."""

import copy

import pytest
import torch
from tests.surgery.hard import CASES

from convette.cost import WidthCost, count
from convette.layers.complex import to_complex
from convette.models import create_model
from convette.surgery import apply, trace

# Name, side of the image. Between them: residuals, depthwise and grouped convolutions, concatenations, squeeze and
# excitation, layer norm, a convolution over channels.
MODELS = [
    ("resnet20", 16),
    ("torchvision:mobilenet_v3_small", 32),
    ("torchvision:regnet_y_400mf", 32),
    ("timm:dla46_c", 32),
    ("timm:ecaresnet26t", 32),
    ("timm:convnext_atto", 32),
]


def build(name, side):
    torch.manual_seed(0)
    return create_model(name, num_classes=7).eval(), torch.randn(1, 3, side, side)


def random_selection(graph, seed):
    """Between a third and all of the units of each group, as its constraints allow."""
    generator = torch.Generator().manual_seed(seed)
    selection = {}
    for group in graph.groups:
        parts, step = group.constraints.parts, group.constraints.multiple_of
        each = group.size // parts
        low = max(1, each // 3, -(-group.constraints.minimum // parts))
        keep = int(torch.randint(low, each + 1, (), generator=generator))
        while keep * parts % step and keep < each:
            keep += 1
        kept = [torch.randperm(each, generator=generator)[:keep].sort().values + part * each for part in range(parts)]
        selection[group.name] = torch.cat(kept)
    return selection


@pytest.mark.parametrize("name, side", MODELS)
def test_predicted_is_counted(name, side):
    model, example = build(name, side)
    graph = trace(model, example)
    assert graph.groups
    width_cost = WidthCost(model, example, graph)
    assert width_cost.exact
    selection = random_selection(graph, seed=1)
    smaller = copy.deepcopy(model)
    apply(smaller, graph.shrink(selection))
    cost = count(smaller, example)
    assert cost.macs < count(model, example).macs
    assert width_cost.macs(selection) == cost.macs
    assert (width_cost.parameters(selection), width_cost.size(selection)) == (cost.parameters, cost.size)


def test_sizes_that_hang_on_two_groups_are_not_taken_for_a_third():
    # The padded shortcuts of these networks put two groups side by side in one stream, and the weights are computed.
    model = to_complex(create_model("resnet20", seed=0)).eval()
    example = torch.randn(1, 3, 16, 16)
    graph = trace(model, example)
    cost = WidthCost(model, example, graph)
    assert cost.exact
    for group in graph.groups:
        selection = {group.name: torch.arange(max(1, group.size // 2))}
        smaller = copy.deepcopy(model)
        apply(smaller, graph.shrink(selection), example=example)
        assert cost.macs(selection) == count(smaller, example).macs, group.name


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("nn.")])
def test_attention_of_pytorchs_own_is_predicted_however_many_heads_stay(name):
    maker, shape = CASES[name]
    torch.manual_seed(0)
    model, example = maker().eval(), torch.randn(shape)
    graph = trace(model, example)
    cost = WidthCost(model, example, graph)
    assert cost.exact and cost.macs({}) == count(model, example).macs
    for seed in range(3):
        selection = random_selection(graph, seed)
        smaller = copy.deepcopy(model)
        apply(smaller, graph.shrink(selection), example=example)
        counted = count(smaller, example)
        assert (cost.macs(selection), cost.parameters(selection)) == (counted.macs, counted.parameters)
