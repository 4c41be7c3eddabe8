"""Quadratic convolution: the form itself, its limits and other forms, published counts, XOR, conversion."""

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.convolution import (
    QuadraticConv2d,
    QuadraticResNet,
    WideFormWarning,
    absorb_norms,
    quadratic_alexnet,
    to_quadratic,
)


def layer(rank=None, c=2, out=3, **arguments):
    torch.manual_seed(0)
    return QuadraticConv2d(c, out, 3, padding=1, rank=rank, **arguments).double()


def maps(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def augmented(x, **arguments):
    v = F.unfold(x, 3, **arguments)
    return torch.cat([v, torch.ones_like(v[:, :1])], 1)


@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_it_is_the_form_of_its_matrix(rank, sign):
    form, x = layer(rank, sign=sign), maps(2, 2, 5, 4)
    v = augmented(x, padding=1)
    expected = sign * torch.einsum("nip,oij,njp->nop", v, form.matrix(), v)
    torch.testing.assert_close(form(x).flatten(2), expected)
    strided = QuadraticConv2d(2, 3, 3, 2, 1, 2, rank=rank, sign=sign).double()
    v = augmented(x, padding=1, stride=2, dilation=2)
    expected = sign * torch.einsum("nip,oij,njp->nop", v, strided.matrix(), v)
    torch.testing.assert_close(strided(x).flatten(2), expected)


def test_in_chunks_it_is_the_same(monkeypatch):
    from convette.layers.convolution import quadratic_convolution

    form, x = layer(), maps(2, 2, 5, 4).requires_grad_()
    whole = form(x)
    expected = torch.autograd.grad(whole.square().sum(), [x, form.form, form.row])
    monkeypatch.setattr(quadratic_convolution, "_MOST_HELD", 800)
    parts = form(x)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), [x, form.form, form.row]), expected)


def test_without_quadratic_terms_it_is_a_convolution():
    form, x = layer(), maps(2, 2, 5, 4)
    with torch.no_grad():
        form.form.zero_()
    weight = form.weight - form.row.view_as(form.weight)
    torch.testing.assert_close(form(x), F.conv2d(x, weight, form.bias, padding=1))


def test_only_the_symmetric_part_counts():
    form, x = layer(), maps(2, 2, 5, 4)
    turned, anti = layer(), layer()
    a = form.matrix()
    turned.load_matrix(a.mT)
    torch.testing.assert_close(turned(x), form(x))
    anti.load_matrix(a - a.mT)
    torch.testing.assert_close(anti(x), torch.zeros_like(form(x)), atol=1e-12, rtol=0)
    torch.testing.assert_close(form.symmetrized()(x), form(x))
    assert torch.equal(form.symmetrized().form, form.symmetrized().form.mT)


@pytest.mark.parametrize("rank", [None, 2])
def test_homogeneity(rank):
    form, x = layer(rank), maps(2, 2, 5, 4)
    with torch.no_grad():
        for name in ("weight", "bias", "row"):
            if hasattr(form, name):
                getattr(form, name).zero_()
    torch.testing.assert_close(form(3 * x), 9 * form(x))
    torch.testing.assert_close(form(-x), form(x))


def test_low_rank_from_eigenvalues():
    form, x = layer(), maps(2, 2, 5, 4)
    exact = form.to_low_rank()
    assert exact.rank == 18
    torch.testing.assert_close(exact(x), form(x), rtol=1e-5, atol=1e-8)
    errors = [float((form.to_low_rank(r)(x) - form(x)).detach().abs().max()) for r in (1, 6, 12, 17)]
    assert errors == sorted(errors, reverse=True)
    again = exact.to_low_rank(18)
    torch.testing.assert_close(again(x), form(x), rtol=1e-5, atol=1e-8)


def test_constant_at_the_borders_and_equivariance_inside():
    form = layer()
    zero = form(torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(zero, form.bias.view(1, -1, 1, 1).expand_as(zero))
    torch.testing.assert_close(form.bias, -form.matrix()[:, -1, -1])
    x = maps(1, 2, 8, 8)
    moved = form(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[..., 2:-1, 3:-1], form(x).roll((1, 2), (2, 3))[..., 2:-1, 3:-1])


def test_patches_in_the_order_of_the_authors():
    form, x = layer(), maps(1, 2, 3, 3)
    a = maps(3, 19, 19)
    form.load_matrix(a, order="position")
    v = torch.cat([x[0].permute(1, 2, 0).flatten(), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(form(x)[0, :, 1, 1], -torch.einsum("i,oij,j->o", v, a, v))
    with pytest.raises(UsageError, match="does not fit"):
        layer(2).load_matrix(a)


@pytest.mark.parametrize("rank", [None, 2])
def test_gradients(rank):
    form = layer(rank, out=2)
    x = maps(1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: form(x), (x, *form.parameters()))
    a = form.matrix()
    v = augmented(x, padding=1)[0, :, 4].detach()
    (grad,) = torch.autograd.grad(form(x)[0, 0, 1, 1], x)
    torch.testing.assert_close(grad.flatten(), (-(a[0] + a[0].mT) @ v)[:-1])


def test_counts():
    from convette.cost import count

    with torch.device("meta"):
        net = quadratic_alexnet()
        assert [sum(p.numel() for p in m.parameters()) for m in net if isinstance(m, QuadraticConv2d)] == [
            25_088,
            2_672_672,
            5_345_344,
            21_307_456,
        ]
        assert sum(p.numel() for p in net.parameters()) == 31_453_354
        assert sum(p.numel() for p in quadratic_alexnet(quadratic=False).parameters()) == 1_250_858
        assert sum(p.numel() for p in QuadraticResNet().parameters()) == 128_030_698
    m, out, positions = 18, 3, 20
    assert sum(p.numel() for p in layer(4).parameters()) == out * (m * 5 + 5)
    x = torch.randn(1, 2, 5, 4)
    # As is usual, element-wise products and sums are not counted: those of the last m of (m + 1)² + m.
    assert count(layer().float(), x).macs == out * positions * (m * m + m)
    assert count(layer(4).float(), x).macs == out * positions * (m * 5 + 4)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_networks_run(rank):
    small = quadratic_alexnet(3, 1, rank=2, image_size=10)
    small(torch.randn(2, 1, 10, 10)).sum().backward()
    net = QuadraticResNet(8, 3, 1, rank, (2, 2, 3)).train()
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    assert isinstance(quadratic_alexnet(quadratic=False)[1], nn.ReLU)


@pytest.mark.parametrize("rank", [None, 2])
def test_an_untrained_network_does_not_overflow_in_eval_mode(rank):
    torch.manual_seed(0)
    net = QuadraticResNet(20, 3, 1, rank, (4, 6, 8)).eval()
    assert bool(torch.isfinite(net(torch.randn(2, 1, 16, 16) * 2)).all())


def test_outputs_start_with_variance_about_one():
    x = torch.randn(64, 4, 6, 6)
    for rank in (None, 1, 4):
        torch.manual_seed(2)
        spread = QuadraticConv2d(4, 64, 3, rank=rank)(x).var()
        assert 0.5 < float(spread) < 2, rank
    bound = (3 / (37 * 8)) ** 0.5
    glorot = QuadraticConv2d(4, 8, 3, init="glorot").matrix().abs()
    assert 0.9 * bound < float(glorot.max()) <= bound


@pytest.mark.parametrize("task", ["xor", "disk"])
def test_one_unit_solves_what_no_linear_one_can(task):
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(400, 2, 1, 1, generator=generator)
    flat = points.flatten(1)
    wanted = flat.prod(1) > 0 if task == "xor" else flat.square().sum(1) < 1.2
    scores = {}
    for name, unit in (("quadratic", QuadraticConv2d(2, 1, 1)), ("linear", nn.Conv2d(2, 1, 1))):
        optimizer = torch.optim.LBFGS(unit.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss(unit=unit, optimizer=optimizer):
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(unit(points).flatten(), wanted.float())
            value.backward()
            return value

        optimizer.step(loss)
        scores[name] = float(((unit(points).flatten() > 0) == wanted).float().mean())
    assert scores["quadratic"] > 0.99 and scores["linear"] < 0.8


@pytest.mark.parametrize("rank", [None, 2])
def test_a_batch_norm_is_absorbed(rank):
    from convette.surgery import fold

    torch.manual_seed(4)
    net = QuadraticResNet(8, 3, 1, rank, (2, 3, 3))
    x = torch.randn(4, 1, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias)
    net.eval()
    folded = fold(net, x) if rank else absorb_norms(net, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(folded(x), net(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="absorb"):
        layer().absorb(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(Stays, match="absorb"):
        layer(rank).folded()


@pytest.mark.parametrize(
    ("name", "where", "count"),
    [
        ("resnet20", None, 1),
        ("torchvision:resnet18", None, 1),
        ("timm:mobilenetv2_050", None, 1),
        ("resnet20", lambda name, module: name.startswith("layer1"), 6),
    ],
)
@pytest.mark.parametrize("rank", [None, 2])
def test_converted_networks_start_as_they_were(name, where, count, rank, tmp_path):
    from convette.models import create_model, load, save

    model = create_model(name, num_classes=3, seed=0).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    to_quadratic(model, rank, where)
    assert sum(isinstance(m, QuadraticConv2d) for m in model.modules()) == count
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.train()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    first = next(m for m in model.modules() if isinstance(m, QuadraticConv2d))
    assert float((first.form if rank is None else first.scale).grad.abs().max()) > 0
    if name == "resnet20" and where is None:
        model.eval()
        save(model, tmp_path / "m.safetensors")
        torch.testing.assert_close(load(tmp_path / "m.safetensors")(x), model(x))


def test_folded_networks_are_saved_and_loaded(tmp_path):
    from convette.models import create_model, load, save
    from convette.surgery import fold

    model = to_quadratic(create_model("resnet20", num_classes=3, seed=0), 2)
    x = torch.randn(2, 3, 16, 16)
    model.train()(x)
    folded = fold(model.eval(), x)
    assert isinstance(folded.bn1, nn.Identity)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    save(folded, tmp_path / "f.safetensors")
    assert torch.equal(load(tmp_path / "f.safetensors")(x), folded(x))


def test_a_norm_that_others_read_around_stays():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.conv, self.norm, self.shared = layer(1).float(), nn.BatchNorm2d(3), shared

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + (y if self.shared else self.norm(y))

    x = torch.randn(1, 2, 5, 4)
    for shared in (True, False):
        assert isinstance(absorb_norms(Twice(shared), x).norm, nn.BatchNorm2d)


def test_refusals_and_the_warning():
    with pytest.warns(WideFormWarning, match="a rank"):
        QuadraticConv2d(17, 1, 3)
    for arguments in ({"groups": 2}, {"padding": "same"}, {"rank": 0}):
        with pytest.raises(UsageError, match="QuadraticConv2d"):
            QuadraticConv2d(2, 2, 3, **arguments)
    with pytest.raises((UsageError, TypeCheckError), match="sign"):
        QuadraticConv2d(2, 2, 3, sign=2)
    with pytest.raises(UsageError, match="expected an input"):
        QuadraticConv2d(2, 2, 3)(torch.randn(1, 3, 4, 4))
    with pytest.raises(UsageError, match="no convolution"):
        to_quadratic(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="6 n"):
        QuadraticResNet(9)
