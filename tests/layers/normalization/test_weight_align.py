"""WeightAlign: filter statistics, invariances, variance through layers, counts, baking."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from convette.errors import UsageError
from convette.layers import fold_layers
from convette.layers.normalization import (
    WAConv2d,
    align_weight,
    bake_weight_align,
    revive_dead_filters,
    weight_align,
)
from convette.layers.normalization.weight_align import EXACT_GAIN, variance_factor


@pytest.mark.parametrize("act", ["relu", "linear", "leaky(0.2)"])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 1, 3, 3), (7, 10)])
def test_filters_have_mean_0_and_the_scaled_variance(shape, act):
    torch.manual_seed(0)
    weight, gain = torch.randn(shape) * 0.3 + 1, torch.randn(shape[0])
    made = align_weight(weight, gain, act).flatten(1)
    n, f = made.shape[1], variance_factor(act)
    assert float(made.mean(1).abs().max()) < 1e-6
    torch.testing.assert_close(made.var(1, correction=0), gain**2 / (n * f), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(made.norm(dim=1), gain.abs() / math.sqrt(f), rtol=1e-5, atol=1e-7)


def test_scale_and_offset_of_a_filter_do_not_matter():
    torch.manual_seed(1)
    weight, gain = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    a, c = torch.rand(4, 1, 1, 1, dtype=torch.float64) + 0.5, torch.randn(4, 1, 1, 1, dtype=torch.float64)
    expected = align_weight(weight, gain)
    torch.testing.assert_close(align_weight(a * weight + c, gain), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(align_weight(-a * weight + c, gain), -expected, rtol=1e-7, atol=1e-9)


def test_the_gradient_is_orthogonal_to_offset_and_length_and_right():
    torch.manual_seed(2)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(align_weight, (weight, gain))
    (align_weight(weight, gain) * torch.randn_like(weight)).sum().backward()
    gradient, centred = weight.grad.flatten(1), weight.detach().flatten(1)
    centred = centred - centred.mean(1, keepdim=True)
    assert float((gradient.sum(1) / gradient.norm(dim=1)).abs().max()) < 1e-5
    assert float(((gradient * centred).sum(1) / gradient.norm(dim=1)).abs().max()) < 1e-5


def test_variance_through_a_layer_of_rectified_inputs():
    torch.manual_seed(3)
    x = torch.randn(20_000, 64).relu()
    weight = torch.randn(256, 64)
    for gain, expected in ((1.0, 1 - 1 / math.pi), (EXACT_GAIN, 1.0)):
        y = x @ align_weight(weight, torch.full((256,), gain)).T
        assert float(y.mean()) == pytest.approx(0, abs=0.02)
        assert float(y.square().mean()) == pytest.approx(expected, rel=0.02)
    assert pytest.approx(1.2111, abs=1e-4) == EXACT_GAIN


def test_a_deep_stack_keeps_its_scale_with_exact_gain_only():
    torch.manual_seed(4)
    second = {}
    for init in ("exact", "one"):
        x = torch.randn(2, 64, 8, 8)
        second[init] = []
        with torch.no_grad():
            for _ in range(30):
                y = WAConv2d(64, 64, 3, padding=1, padding_mode="circular", init=init)(x)
                second[init].append(float(y.square().mean()))
                x = y.relu()
    depths = [second["exact"][index] for index in (0, 9, 29)]
    assert max(depths) / min(depths) < 3
    ratio = (second["one"][29] / second["one"][9]) ** (1 / 20)
    assert ratio == pytest.approx(1 - 1 / math.pi, abs=0.06)


def test_training_and_inference_are_the_same_bit_for_bit():
    torch.manual_seed(5)
    layer, x = WAConv2d(3, 4, 3), torch.randn(4, 3, 8, 8)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_resnet50_counts():
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
        count = sum(p.numel() for p in model.parameters())
        weight_align(model)
    assert count == 25_557_032
    assert sum(p.numel() for p in model.parameters()) == count + 26_560


def test_baked_networks_are_plain_and_equal():
    torch.manual_seed(6)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 2, 2)
    )
    keys = set(plain.state_dict())
    model = weight_align(copy.deepcopy(plain), init="exact").eval()
    assert parametrize.is_parametrized(model[0]) and not parametrize.is_parametrized(model[4])
    model[3] = nn.Sequential(WAConv2d(8, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    folded = fold_layers(model)
    assert folded.folded == {"0": "Conv2d", "3.0": "Conv2d"}
    torch.testing.assert_close(folded.model(x), expected, atol=1e-6, rtol=1e-6)
    bake_weight_align(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    assert {key.replace("3.0.", "3.") for key in model.state_dict()} == keys


def test_kept_gains_keep_the_function_of_centred_filters():
    torch.manual_seed(7)
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight.sub_(conv.weight.mean((1, 2, 3), keepdim=True))
    x = torch.randn(2, 3, 6, 6)
    expected = conv(x)
    model = weight_align(nn.Sequential(conv), init="keep")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_computed_in_single():
    weight = torch.randn(4, 512, 3, 3) * 0.02 + 1
    made = align_weight(weight.bfloat16(), torch.ones(4))
    assert made.dtype == torch.bfloat16
    exact = align_weight(weight.bfloat16().float(), torch.ones(4))
    torch.testing.assert_close(made.float(), exact, rtol=1e-2, atol=1e-5)


def test_dead_filters_are_0_and_can_be_revived():
    layer = WAConv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0.5
    assert float(layer.aligned_weight()[1].abs().max()) == 0
    assert revive_dead_filters(layer) == 1 and revive_dead_filters(layer) == 0
    assert float(layer.aligned_weight()[1].norm()) == pytest.approx(math.sqrt(2), rel=1e-4)


def test_refusals():
    with pytest.raises(UsageError, match="one entry"):
        WAConv2d(4, 4, 1, groups=4)
    with pytest.raises(UsageError, match="act 'gelu'"):
        WAConv2d(4, 4, 3, act="gelu")
    depthwise = weight_align(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4)))
    assert not parametrize.is_parametrized(depthwise[0])


def test_a_plain_eight_layer_net_learns_a_little_data():
    """Without any statistic of activations; the same net without WeightAlign does not start."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:512], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[:512])
    losses = {}
    for aligned in (True, False):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for index in range(8):
            layers += [nn.Conv2d(1 if index == 0 else 16, 16, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        if aligned:
            weight_align(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        for step in range(100):
            part = slice(64 * (step % 8), 64 * (step % 8) + 64)
            loss = functional.cross_entropy(model(x[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses[aligned] = float(functional.cross_entropy(model(x), labels))
    assert losses[True] < losses[False] - 0.3
