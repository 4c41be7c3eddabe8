"""Every public layer of every room, found by itself, in a network: it is folded exactly, or says why not; it is shrunk
exactly, or refused. And whole networks, converted and folded."""

import copy
import functools

import pytest
import torch
from torch import nn

from convette import models
from convette.errors import ConvetteError, StructureError
from convette.layers import is_layer, public_layers
from convette.layers.normalization import SparseSwitchNorm2d
from convette.surgery import Conversion, apply, convert_by, fold, trace, what_stays

# Whole networks have tests of their own.
CLASSES = {
    name: symbol
    for name, symbol in public_layers().items()
    if is_layer(symbol) and not name.endswith(("Net", "Network"))
}
EXAMPLE = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(2))
# Ways to put a layer into the network below, in the order in which they are tried.
WAYS = (
    {"replace": ("BatchNorm2d",)},
    {"replace": ("Conv2d",), "include": ("3",)},
    {"replace": ("ReLU",)},
    {"replace": ("Linear",)},
    {"replace": ("BatchNorm1d",)},
    {"after": ("2",)},
)


def small():
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)),
    )


@functools.cache
def placed(kind):
    """Return a network with the layer in it, trained for two steps; None where no way fits."""
    for way in WAYS:
        model = small()
        try:
            convert_by(model, Conversion(kind, **way), example=EXAMPLE)
            model.train()
            for _ in range(2):
                loss = model(EXAMPLE + 0.1).float().square().mean()
                model.zero_grad()
                loss.backward()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.data.sub_(0.01 * parameter.grad)
        except (ConvetteError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            continue
        return model.eval()
    return None


@pytest.mark.parametrize("name", CLASSES)
def test_it_folds_exactly_or_says_why_not_and_is_shrunk_exactly_or_refused(name):
    model = placed(CLASSES[name])
    if model is None:
        pytest.skip("has no place of its own in a plain network")
    model = copy.deepcopy(model)
    expected, state = model(EXAMPLE), copy.deepcopy(model.state_dict())
    folded = fold(model, EXAMPLE)
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(folded(EXAMPLE) / scale, expected / scale, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(len(reason) > 20 for reason in what_stays(folded).values())
    try:
        graph = trace(model, EXAMPLE)
        chosen = {group.name: torch.arange(max(1, group.size // 2)) for group in graph.groups}
        apply(model, graph.shrink(chosen), example=EXAMPLE, prove=True)  # raises unless it equals the masked network
    except StructureError as error:
        assert len(str(error)) > 20


def test_most_layers_have_a_place():
    assert len({symbol.__module__ for symbol in CLASSES.values() if placed(symbol) is not None}) >= 12


WHOLE = {
    "weight-align": [Conversion("weight-align")],
    "switchable": [Conversion("SparseSwitchNorm2d", replace=("BatchNorm2d",), options={"candidates": ["bn"]})],
    "filtered": [
        Conversion("FilteredBatchNorm2d", replace=("BatchNorm2d",)),
        Conversion("MixStyle", after=("stage:1",)),
        Conversion("MaxDropout", after=("stage:2",)),
        Conversion("FinalNormLinear", replace=("Linear",)),
    ],
    "linear": [
        Conversion("BNET2d", replace=("BatchNorm2d",), where=("last in block",), options={"k": 1}),
        Conversion("SkewReducedBatchNorm2d", replace=("BatchNorm2d",), where=("stem",), options={"p": 1.0}),
    ],
}


@pytest.mark.parametrize("network", ["resnet20", "mobilenet_v2", "timm:efficientnet_b0"])
@pytest.mark.parametrize("case", WHOLE)
def test_whole_networks_fold_back_to_plain_ones(network, case):
    model = models.create_model(network, num_classes=4, in_channels=3, seed=0)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    convert_by(model, *WHOLE[case])
    model.train()(images)
    for module in model.modules():
        if isinstance(module, SparseSwitchNorm2d):
            module.decide()
    expected = model.eval()(images)
    folded = fold(model, images)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(folded(images) / scale, expected / scale, atol=1e-5, rtol=1e-5)
    left = what_stays(folded)
    assert not left, left
    assert all(not type(module).__module__.startswith("convette.layers") for module in folded.modules())
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in folded.modules())


def test_what_stays_tells_why():
    model = small()
    convert_by(
        model,
        Conversion("bnet", replace=("BatchNorm2d",), include=("1",)),
        Conversion("GroupNorm", replace=("BatchNorm2d",), include=("4",), options={"num_groups": 2}),
        example=EXAMPLE,
    )
    left = what_stays(fold(model.eval(), EXAMPLE))
    assert any("depthwise" in reason for reason in left.values())
    assert any("statistics of its input" in reason for reason in left.values())
    alone = what_stays(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)).eval())
    assert list(alone) == ["0"] and "no convolution" in alone["0"]
