"""HO: identity and box filters, softmax and first order, second order, maps against clips, equivariance, placement."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers import Stays, folded_form
from convette.layers.attention import HigherOrderBlock, insert_higher_order, local_filter


def block(*args, **kwargs):
    torch.manual_seed(0)
    layer = HigherOrderBlock(*args, **kwargs).double()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return layer.eval()


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_constant_filters_identity_and_box():
    layer, x = block(8), drawn(2, 8, 5, 6)
    nn.init.zeros_(layer.generator.weight)
    v = layer.value(x)
    assert torch.equal(local_filter(v, layer.filters(x), (3, 3)), v)
    nn.init.constant_(layer.generator.bias, 1 / 9)
    box = functional.avg_pool2d(v, 3, 1, 1, count_include_pad=True)
    torch.testing.assert_close(local_filter(v, layer.filters(x), (3, 3)), box)


def test_the_identity_start_is_bit_exact_and_still_learns():
    layer, x = block(8, start="identity"), drawn(2, 8, 5, 6)
    assert torch.equal(layer(x), x + layer.output_norm.bias.view(1, -1, 1, 1) * 0)
    layer.train()(x).square().sum().backward()
    assert float(layer.output_norm.weight.grad.abs().max()) > 0


def test_softmax_makes_convex_combinations():
    layer, x = block(8, norm="softmax"), drawn(2, 8, 6, 6)
    filters = layer.filters(x)
    torch.testing.assert_close(filters.sum(2), torch.ones_like(filters.sum(2)), atol=1e-6, rtol=0)
    v = layer.value(x)
    z = local_filter(v, filters, (3, 3))[..., 1:-1, 1:-1]
    highest = functional.max_pool2d(v, 3, 1)
    lowest = -functional.max_pool2d(-v, 3, 1)
    assert bool((z <= highest + 1e-9).all()) and bool((z >= lowest - 1e-9).all())
    lengths = block(8, norm="l2").filters(x).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("window", [(3, 3), (1, 5), (3, 3, 3), (1, 3, 5)])
def test_first_order_limit_is_a_group_convolution(window):
    """A generator that ignores its input: fixed filters, shared by the channels of a group."""
    layer = block(8, window, groups=2)
    nn.init.zeros_(layer.generator.weight)
    nn.init.normal_(layer.generator.bias)
    x = drawn(2, 8, 4, 5, 6)[:, :, 0] if len(window) == 2 else drawn(2, 8, 4, 5, 6)
    v = layer.value(x)
    kernel = layer.generator.bias.view(2, 1, *window).repeat_interleave(2, 0)
    conv = functional.conv2d if len(window) == 2 else functional.conv3d
    expected = conv(v, kernel, padding=tuple(size // 2 for size in window), groups=4)
    torch.testing.assert_close(local_filter(v, layer.filters(x), window), expected)


def test_it_is_of_second_order():
    """Linear generator, no bias: z(a x) = a² z(x), and sums do not pass."""
    torch.manual_seed(1)
    generate, value = nn.Conv2d(4, 2 * 9, 3, padding=1, bias=False).double(), nn.Conv2d(4, 4, 1, bias=False).double()

    def z(x):
        return local_filter(value(x), generate(x).unflatten(1, (2, 9)), (3, 3))

    x, y = drawn(1, 4, 5, 5), drawn(1, 4, 5, 5)
    torch.testing.assert_close(z(3 * x), 9 * z(x))
    assert float((z(x + y) - z(x) - z(y)).norm() / z(x + y).norm()) > 0.1


def test_maps_are_clips_of_one_frame():
    clips, maps = block(8, (1, 3, 3)), block(8, (3, 3))
    maps.load_state_dict({k: t.squeeze(2) if t.ndim == 5 else t for k, t in clips.state_dict().items()})
    x = drawn(2, 8, 5, 7)
    torch.testing.assert_close(clips(x.unsqueeze(2)).squeeze(2), maps(x))


def test_frames_of_a_batch_are_clips():
    clips, flat = block(8, (3, 3, 3)), block(8, (3, 3, 3), frames=4)
    flat.load_state_dict(clips.state_dict())
    x = drawn(2, 8, 4, 5, 6)
    torch.testing.assert_close(flat(x.transpose(1, 2).flatten(0, 1)), clips(x).transpose(1, 2).flatten(0, 1))
    with pytest.raises(UsageError, match="whole clips of 4"):
        flat(drawn(6, 8, 5, 6))


def test_shifts_pass_and_time_has_a_direction():
    layer = block(8, (3, 3, 3))
    x = functional.pad(drawn(1, 8, 3, 3, 3), (4,) * 6)
    y = layer(x)
    for axis in (2, 3, 4):
        moved = layer(x.roll(1, axis)).roll(-1, axis)
        inside = (slice(None), slice(None), *[slice(2, -3)] * 3)
        torch.testing.assert_close(moved[inside], y[inside])
    backwards = layer(x.flip(2)).flip(2)
    assert float((backwards - y).abs().max()) > 0.05


def test_attention_is_the_special_case():
    u, v = drawn(1, 4, 4, 5), drawn(1, 4, 4, 5)
    padded = functional.pad(u, (1, 1, 1, 1))
    scores = torch.stack(
        [(u * padded[..., a : a + 4, b : b + 5]).sum(1) for a, b in itertools.product(range(3), repeat=2)], 1
    )
    weights = scores.softmax(1)
    found = local_filter(v, weights.unsqueeze(1), (3, 3))
    columns = functional.unfold(v, 3, padding=1).unflatten(1, (4, 9)).unflatten(3, (4, 5))
    torch.testing.assert_close(found, (columns * weights.unsqueeze(1)).sum(2))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_odd_sizes_and_groups(groups):
    layer = block(8, (3, 3), groups=groups)
    assert layer(drawn(1, 8, 5, 3)).shape == (1, 8, 5, 3)
    x = drawn(1, 4, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(block(4, groups=1), (x,))
    assert block(4, (3, 3, 3))(drawn(1, 4, 5, 3, 1)).shape == (1, 4, 5, 3, 1)


def test_counts():
    c, half, groups, taps = 64, 32, 16, 9
    expected = 2 * c * half + taps * half * half // 2 + (half // 2 + 1) * groups * taps + half * c
    norms = 2 * (half + half // 2 + c)
    assert sum(p.numel() for p in HigherOrderBlock(c).parameters()) == expected + norms
    assert HigherOrderBlock(128).generator.out_channels == 8 * 9  # an eighth of 64


def test_placement_is_the_published_one():
    from torchvision.models import resnet50

    from convette.models import create_model

    with torch.device("meta"):
        model = resnet50()
    assert insert_higher_order(model) is model
    places = [name for name, module in model.named_modules() if isinstance(module, HigherOrderBlock)]
    assert places == ["layer2.1.1", "layer2.3.1", "layer3.1.1", "layer3.3.1", "layer3.5.1"]
    small = create_model("resnet20", seed=0).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = small(x)
    assert torch.equal(insert_higher_order(small)(x), expected)
    with pytest.raises(UsageError, match="no stage 4"):
        insert_higher_order(create_model("resnet20"), stages=(4,))


def test_refusals():
    with pytest.raises(UsageError, match="does not see"):
        HigherOrderBlock(8, (3, 3), context=(1, 3))
    with pytest.raises(UsageError, match="3 groups do not divide"):
        HigherOrderBlock(8, groups=3)
    with pytest.raises(UsageError, match="odd sides"):
        HigherOrderBlock(8, (2, 3))
    with pytest.raises(UsageError, match="norm 'l1'"):
        HigherOrderBlock(8, norm="l1")
    with pytest.raises(UsageError, match="expected an input"):
        HigherOrderBlock(8)(torch.zeros(1, 4, 3, 3))
    with pytest.raises(UsageError, match="at least 2"):
        HigherOrderBlock(8).train()(torch.zeros(1, 8, 1, 1))
    with pytest.raises(Stays, match="generated"):
        folded_form(HigherOrderBlock(8))
    assert math.prod(HigherOrderBlock(8).filters(torch.zeros(1, 8, 2, 2)).shape) == 2 * 9 * 4
