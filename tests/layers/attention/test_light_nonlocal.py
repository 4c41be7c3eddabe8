"""LightNL: both orders, its start, homogeneity, the authors' MAC counts, AutoNL-S, placement."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.attention import LightNonLocal2d, autonl_s, insert_nonlocal, nonlocal_macs, orders_macs


def maps(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0.01, 0.25, 0.5, 1.0]), st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 6)
)
def test_both_orders_agree_with_the_definition(ratio, stride, c, h, w):
    x = maps(2, c, h, w)
    compared = max(1, int(ratio * c))
    q = x[:, :, ::stride, ::stride].flatten(2)
    likeness = torch.einsum("nip,niq->npq", x[:, :compared].flatten(2), q[:, :compared])
    expected = (torch.einsum("npq,njq->njp", likeness, q) / (h * w)).view_as(x)
    for order in ("affinity", "moments", "auto"):
        layer = LightNonLocal2d(c, ratio, stride, order=order).double()
        torch.testing.assert_close(layer.product(x), expected, atol=1e-10, rtol=1e-10)


def test_it_starts_as_the_identity_and_learns():
    layer, x = LightNonLocal2d(8).double().train(), maps(2, 8, 5, 5)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert float(layer.norm.weight.grad.abs().min()) > 0


def test_homogeneity_and_permutations():
    x = maps(2, 8, 4, 5)
    layer = LightNonLocal2d(8, 0.5).double()
    torch.testing.assert_close(layer.product(2 * x), 8 * layer.product(x))
    order = torch.randperm(20)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(layer.product(shuffled), layer.product(x).flatten(2)[..., order].view_as(x))


def test_the_port_multiplies_by_the_width():
    x = maps(1, 4, 3, 5)
    right, port = LightNonLocal2d(4).double(), LightNonLocal2d(4, port_scale=True).double()
    torch.testing.assert_close(port.product(x), right.product(x) * 25)


@pytest.mark.parametrize(("c", "side", "published"), [(24, 56, 1.581e6), (40, 28, 0.909e6), (96, 14, 1.073e6)])
def test_macs_as_the_authors_count_them(c, side, published):
    assert nonlocal_macs(c, side, side) == pytest.approx(published, rel=1e-3)


def test_the_cheaper_order_is_taken_and_counted():
    from convette.cost import count

    for c, side, stride in ((8, 12, 1), (64, 4, 1), (16, 9, 2)):
        layer = LightNonLocal2d(c, 0.5, stride)
        x = torch.randn(1, c, side, side)
        assert count(layer, x).macs == nonlocal_macs(c, side, side, 0.5, stride)
    first, second = orders_macs(64, 32, 4, 4)
    assert first < second
    first, second = orders_macs(8, 4, 12, 12)
    assert first > second
    assert orders_macs(8, 8, 5, 3, 2)[0] == 15 * 6 * 16  # sampled positions round up


def test_counts_of_autonl_s():
    from convette.cost import count

    with torch.device("meta"):
        model = autonl_s()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.4e6, rel=0.01)
    assert sum(isinstance(m, LightNonLocal2d) for m in model.modules()) == 7
    small = autonl_s(10).eval()
    assert small(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert count(small, torch.randn(1, 3, 224, 224)).macs == pytest.approx(267e6, rel=0.01)


def test_gradients_and_precision():
    layer = LightNonLocal2d(3, 0.5, 2, zero_init=False).double().eval()
    x = maps(1, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    half = LightNonLocal2d(8).half()
    large = torch.full((1, 8, 6, 6), 60.0).half()  # 60³ does not fit into float16
    assert float(half.product(large).max()) == pytest.approx(2 * 60**3, rel=1e-3)


def test_odd_widths_and_sizes():
    layer = LightNonLocal2d(5, 0.25)
    assert layer.compared == 1 and sum(p.numel() for p in layer.parameters()) == 11 * 5
    assert layer(torch.randn(2, 5, 3, 7)).shape == (2, 5, 3, 7)


def test_folds_its_norm():
    from convette.surgery import fold

    torch.manual_seed(1)
    layer = LightNonLocal2d(6, zero_init=False)
    for _ in range(2):
        layer(torch.randn(4, 6, 5, 5))
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 6, 5, 5)
    folded = fold(model, x)
    assert isinstance(folded[0].norm, nn.Identity)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(Stays, match="product"):
        layer.folded()


@pytest.mark.parametrize(
    ("name", "at", "count"),
    [
        ("mobilenet_v2", "block", 17),
        ("timm:resnet18", "block", 8),
        ("torchvision:mobilenet_v2", ["features.3.conv.3"], 1),
        ("resnet20", "stage", 3),
    ],
)
def test_inserted_into_networks_it_changes_nothing_at_first(name, at, count, tmp_path):
    from convette.models import create_model, load, save

    model = create_model(name, num_classes=3, seed=0).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    insert_nonlocal(model, x, at)
    assert sum(isinstance(m, LightNonLocal2d) for m in model.modules()) == count
    torch.testing.assert_close(model(x), expected)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))


def test_a_shrunk_network_may_take_the_other_order():
    from convette.surgery import apply, trace

    torch.manual_seed(2)
    layer = LightNonLocal2d(40, 0.5, zero_init=False)
    model = nn.Sequential(nn.Conv2d(1, 40, 1), layer, nn.Conv2d(40, 2, 1)).eval()
    x = torch.randn(2, 1, 5, 4)
    assert layer._affinity_first(torch.empty(1, 40, 5, 4), 20)
    graph = trace(model, x)
    apply(model, graph.shrink({group.name: torch.arange(10, 30) for group in graph.groups}), example=x, prove=True)
    assert model[1].compared == 10 and not model[1]._affinity_first(torch.empty(1, 20, 5, 4), 10)


def test_refusals():
    for arguments in ({"ratio": 0.0}, {"ratio": 1.5}, {"stride": 0}):
        with pytest.raises(UsageError, match="at most 1"):
            LightNonLocal2d(4, **arguments)
    with pytest.raises(UsageError, match="at least 2"):
        LightNonLocal2d(4)(torch.randn(1, 4, 1, 1))
    with pytest.raises(UsageError, match="example"):
        insert_nonlocal(nn.Sequential(nn.Conv2d(1, 1, 1)), at=["0"])
