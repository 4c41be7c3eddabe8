"""Poincaré ResNet: the ball's algebra, hand-written gradients, identity and flat limits, norms, counts, learning."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers import Stays, folded_form
from convette.layers.hyperbolic import (
    PoincareAdd,
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareBlock,
    PoincareConv2d,
    PoincareLinear,
    beta_ratio,
    poincare_resnet,
    to_poincare,
)
from convette.layers.hyperbolic._ball import _mobius, margin
from convette.models import create_model, load, save

BALL = PoincareBall(0.3)
CURVATURES = (0.01, 0.1, 1.0)


def points(*shape, c=0.3, share=0.8):
    """Points of random direction, up to `share` of the radius from the origin."""
    x = torch.randn(*shape, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True) * torch.rand(*shape[:-1], 1, dtype=torch.float64) * share * c**-0.5


@pytest.mark.parametrize("c", CURVATURES)
def test_the_maps_are_inverse_and_the_sum_cancels(c):
    torch.manual_seed(0)
    ball, x, y = PoincareBall(c), points(20, 5, c=c), points(20, 5, c=c)
    torch.testing.assert_close(ball.exp0(ball.log0(x)), x, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ball.exp(x, ball.log(x, y)), y, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(ball.add(-x, ball.add(x, y)), y, atol=1e-10, rtol=1e-10)
    assert float(ball.add(x, -x).abs().max()) < 1e-12
    torch.testing.assert_close(ball.distance(x, y), ball.distance(y, x))
    assert float(ball.distance(x, x).max()) < 1e-9
    lengths = ball.conformal(x) * ball.log(x, y).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ball.distance(x, y), lengths)


def test_gyrations_turn_and_transport_keeps_lengths():
    torch.manual_seed(1)
    x, y, w = points(20, 5), points(20, 5), points(20, 5)
    defined = BALL.add(-BALL.add(x, y), BALL.add(x, BALL.add(y, w)))
    torch.testing.assert_close(BALL.gyrate(x, y, w), defined, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(BALL.gyrate(x, y, w).norm(dim=-1), w.norm(dim=-1))
    torch.testing.assert_close(BALL.transport(x, x, w), w, atol=1e-10, rtol=1e-10)
    carried = BALL.conformal(y) * BALL.transport(x, y, w).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(carried, BALL.conformal(x) * w.norm(dim=-1, keepdim=True))


def test_the_flat_limit():
    torch.manual_seed(2)
    ball, x, y = PoincareBall(1e-8), torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(ball.add(x, y), x + y, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ball.midpoint(x, (0,)), x.mean(0, keepdim=True), atol=1e-6, rtol=1e-6)
    layer = PoincareLinear(4, 3, dtype=torch.float64, c=1e-8)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    expected = 2 * x @ layer.weight.T - 2 * layer.bias * layer.weight.norm(dim=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.euclidean()(x), expected, atol=1e-9, rtol=1e-9)
    conv = nn.Conv2d(3, 4, 3, 2, 1).double()
    curved = PoincareConv2d(3, 4, 3, 2, 1, dtype=torch.float64, c=1e-8)
    curved.take_over(conv)
    maps = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(curved(maps), conv(maps), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(curved.euclidean()(maps), conv(maps), atol=1e-9, rtol=1e-9)


def test_midpoints():
    torch.manual_seed(3)
    x = points(6, 4)
    torch.testing.assert_close(BALL.midpoint(x[:1], (0,)), x[:1])
    torch.testing.assert_close(BALL.midpoint(torch.cat([x[:1]] * 5), (0,)), x[:1])
    assert float(BALL.midpoint(torch.cat([x, -x]), (0,)).abs().max()) < 1e-12
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(BALL.midpoint(x @ turn, (0,)), BALL.midpoint(x, (0,)) @ turn, atol=1e-10, rtol=1e-10)
    near = points(6, 4, share=0.05) + 0.2
    torch.testing.assert_close(BALL.midpoint(near, (0,)), BALL.frechet_mean(near), atol=1e-3, rtol=1e-2)
    assert float(BALL.log(BALL.frechet_mean(x), x).mean(0).abs().max()) < 1e-6


def test_gradients_written_by_hand_are_those_of_the_formulas():
    torch.manual_seed(4)
    x, y = points(6, 5).requires_grad_(), points(6, 5).requires_grad_()
    upstream = torch.randn(6, 5, dtype=torch.float64)
    by_hand = torch.autograd.grad(BALL.add(x, y), (x, y), upstream)
    by_formula = torch.autograd.grad(_mobius(x, y, BALL.c, -1), (x, y), upstream)
    for one, other in zip(by_hand, by_formula, strict=True):
        assert float((one - other).abs().max()) < 1e-12
    for radial in (BALL.exp0, BALL.log0):
        assert torch.autograd.gradcheck(radial, (x,))
        tiny = (1e-7 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(radial, (tiny,), eps=1e-9, atol=1e-4)
        zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(radial(zero), zero, torch.ones_like(zero))
        torch.testing.assert_close(gradient, torch.ones_like(zero))
        far = (points(3, 5) * 1e3).requires_grad_()  # at the margin, where lengths no longer change
        assert torch.autograd.gradcheck(radial, (far,))
    assert torch.autograd.gradcheck(lambda a, b: BALL.add(a, b[:1]), (x, y))


@pytest.mark.parametrize("c", CURVATURES)
def test_half_the_identity_is_the_identity(c):
    torch.manual_seed(5)
    for init in ("dirac", "eye"):
        layer = PoincareLinear(5, 5, dtype=torch.float64, c=c, init=init)
        v = torch.randn(6, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(v), v, atol=1e-12, rtol=1e-12)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(PoincareConv2d(5, 5, 1, dtype=torch.float64, c=c)(x), x, atol=1e-12, rtol=1e-12)


def test_norms_pass_twenty_layers_with_one_start_and_collapse_with_the_other():
    torch.manual_seed(6)
    v = torch.randn(32, 16, dtype=torch.float64)
    ends = {}
    for init in ("dirac", "normal"):
        y = v
        for _ in range(20):
            y = PoincareLinear(16, 16, dtype=torch.float64, init=init)(y)
        ends[init] = float(y.norm(dim=1).mean().detach())
    assert ends["dirac"] == pytest.approx(float(v.norm(dim=1).mean()), rel=1e-9)
    assert ends["normal"] < 1e-6


def test_the_layer_is_the_published_formula_over_unfolded_patches():
    """No patch is made in the layer; here they are."""
    torch.manual_seed(7)
    c = 0.4
    ball, layer = PoincareBall(c), PoincareConv2d(3, 4, 3, 2, 1, dtype=torch.float64, c=c)
    nn.init.normal_(layer.weight, std=0.3), nn.init.normal_(layer.bias, std=0.3)
    x = 0.4 * torch.randn(2, 3, 5, 6, dtype=torch.float64)
    patches = beta_ratio(3, 9) * functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    point = ball.exp0(patches)
    z, r, root = layer.weight.flatten(1), layer.bias, c**0.5
    lengths, lam = z.norm(dim=1), ball.conformal(point)
    inner = lam * root * (point @ (z / lengths[:, None]).T) * torch.cosh(2 * root * r) - (lam - 1) * torch.sinh(
        2 * root * r
    )
    w = torch.sinh(root * 2 * lengths / root * torch.asinh(inner)) / root
    y = ball.project(w / (1 + (1 + c * w.square().sum(-1, keepdim=True)).sqrt()))
    expected = ball.log0(y).transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=1e-9)


def test_ratios_and_counts_are_the_published_ones():
    assert [round(beta_ratio(n, 9), 4) for n in (3, 8, 16, 32)] == [0.31, 0.3242, 0.3287, 0.331]
    for depth, width, expected in ((20, 8, 68_757), (32, 8, 117_601), (20, 16, 272_397), (20, 4, 17_529)):
        model = (
            create_model("poincare_resnet", seed=0)
            if (depth, width) == (20, 8)
            else poincare_resnet(depth, (width, 2 * width, 4 * width))
        )
        assert sum(p.numel() for p in model.parameters()) == expected
    pilot = poincare_resnet(8, (4, 8, 16), in_channels=1)
    assert sum(p.numel() for p in pilot.parameters()) == 5_125


def test_batch_norm_puts_midpoint_and_spread_where_they_should_be():
    torch.manual_seed(8)
    norm = PoincareBatchNorm2d(4, dtype=torch.float64, c=0.3)
    x = 0.5 * torch.randn(8, 4, 5, 5, dtype=torch.float64) + 0.4
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        norm.weight.fill_(0.7)
    y = BALL.exp0(norm(x), 1)
    aim = BALL.exp0(norm.bias.detach())
    middle = BALL.midpoint(y, (0, 2, 3), 1).flatten()
    assert float((middle - aim).norm() / aim.norm()) < 0.05
    spread = BALL.distance(y, aim.view(1, -1, 1, 1), 1).square().mean()
    assert float(spread.detach()) == pytest.approx(0.7, rel=0.01)
    plain = PoincareBatchNorm2d(4, affine=False, dtype=torch.float64, c=0.3)
    centred = BALL.exp0(plain(x), 1)
    torch.testing.assert_close(
        BALL.midpoint(centred, (0, 2, 3), 1), torch.zeros(1, 4, 1, 1).double(), atol=2e-2, rtol=0
    )
    torch.testing.assert_close(
        norm.running_mean * 10, BALL.log0(BALL.midpoint(BALL.exp0(x, 1), (0, 2, 3), 1), 1).flatten()
    )


def test_eval_uses_running_statistics_alone():
    torch.manual_seed(9)
    model = poincare_resnet(8, (4, 8, 16), 3)
    x = torch.randn(6, 3, 8, 8)
    for _ in range(3):
        model(x)
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-5, rtol=1e-5)


def test_everything_stays_inside():
    torch.manual_seed(10)
    ball = PoincareBall(1.0)
    for scale in (1.0, 1e2, 1e4):
        v = scale * torch.randn(5, 4)
        for point in (ball.exp0(v), ball.project(v)):
            assert float(point.norm(dim=1).max()) <= 1 - margin(torch.float32) + 1e-6
        layer = PoincareLinear(4, 4, c=1.0)
        nn.init.normal_(layer.weight, std=5), nn.init.normal_(layer.bias)
        y = layer(v.requires_grad_())
        assert float(ball.exp0(y).detach().norm(dim=1).max()) <= 1 - margin(torch.float32) + 1e-5
        y.sum().backward()
        assert bool(torch.isfinite(layer.weight.grad).all()) and bool(torch.isfinite(v.grad).all())


def test_gradients_of_layers():
    torch.manual_seed(11)
    x = (0.5 * torch.randn(2, 2, 3, 3, dtype=torch.float64)).requires_grad_()
    conv = PoincareConv2d(2, 3, 3, padding=1, dtype=torch.float64)
    nn.init.normal_(conv.weight), nn.init.normal_(conv.bias)
    assert torch.autograd.gradcheck(conv, (x,))
    norm = PoincareBatchNorm2d(2, dtype=torch.float64)
    nn.init.normal_(norm.bias)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(lambda a: PoincareAdd(0.5)(a, a * a), (x,))


def test_orders_of_the_shortcut_differ():
    torch.manual_seed(12)
    a, b = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    fr, rf = PoincareAdd(0.5, "fr")(a, b), PoincareAdd(0.5, "rf")(a, b)
    assert float((fr - rf).abs().max()) > 1e-2
    torch.testing.assert_close(rf, PoincareAdd(0.5, "fr")(b, a))


def test_a_network_is_made_hyperbolic_and_shrinks_exactly():
    from convette.surgery import apply, trace

    torch.manual_seed(13)
    model = create_model("resnet20", num_classes=4, seed=0)
    x = 0.05 * torch.randn(2, 3, 16, 16)
    flat = copy.deepcopy(model).eval()
    made = to_poincare(model, keep=True, c=1e-6).eval()
    convs = [(a, b) for a, b in zip(flat.modules(), made.modules(), strict=False) if isinstance(a, nn.Conv2d)]
    first, curved = convs[0]
    torch.testing.assert_close(curved(x), first(x), atol=1e-4, rtol=1e-3)
    assert made(x).shape == (2, 4)
    net = poincare_resnet(8, (4, 8, 16)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 8, 8)
    graph = trace(net, images)
    assert len(graph.groups) == 6 and not graph.frozen
    half = {group.name: torch.arange(group.size // 2) for group in graph.groups}
    apply(net, graph.shrink(half), example=images, prove=True)


def test_written_and_read(tmp_path):
    model = create_model("poincare_resnet8_4", num_classes=4, seed=0)
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(load(tmp_path / "model.safetensors")(x), model.eval()(x))


def test_it_learns_digits():
    """Shapes of ink in a second: the corrected forms learn from their identity start."""
    from sklearn.datasets import load_digits

    torch.manual_seed(14)
    digits = load_digits()
    images = torch.tensor(digits.images[:640], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[:640])
    model = poincare_resnet(8, (4, 8, 16), in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, weight_decay=1e-4)
    losses = []
    for step in range(20):
        part = slice(32 * step, 32 * step + 32)
        loss = functional.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_refusals():
    with pytest.raises(UsageError, match=r"c 0\.0"):
        PoincareBall(0.0)
    with pytest.raises(UsageError, match="groups 2"):
        PoincareConv2d(4, 4, 3, groups=2)
    with pytest.raises(UsageError, match="init 'he'"):
        PoincareConv2d(4, 4, 3, init="he")
    with pytest.raises(UsageError, match="expected an input"):
        PoincareConv2d(4, 4, 3)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(UsageError, match="at least 2"):
        PoincareBatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(UsageError, match="depth 10"):
        poincare_resnet(10)
    with pytest.raises(UsageError, match="order 'r'"):
        PoincareBlock(4, 4, order="r")
    with pytest.raises(UsageError, match="no layer of one group"):
        to_poincare(nn.Sequential(nn.ReLU()))
    for layer in (PoincareConv2d(2, 2, 1), PoincareLinear(2, 2), PoincareBatchNorm2d(2)):
        with pytest.raises(Stays, match="curved space"):
            folded_form(layer)
