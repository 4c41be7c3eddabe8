"""FDCC: conservation, ensembles and even mixing as limits, permutations, counts, static routing, collapse, reports."""

import copy

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays, folded_form
from convette.layers.routing import (
    CrossConnection,
    PathMean,
    Paths,
    StaticRouting,
    balance_loss,
    collect_routes,
    freeze_routing,
    multipath,
    route_report,
)
from convette.models import create_model


def drawn(channels=6, incoming=2, outgoing=None, **options):
    torch.manual_seed(0)
    layer = CrossConnection(channels, incoming, outgoing, **options, dtype=torch.float64)
    nn.init.normal_(layer.gate.weight)
    return layer


def features(channels=12, count=3):
    torch.manual_seed(1)
    return torch.randn(count, channels, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("paths", [(2, 2), (3, 3), (1, 3), (3, 1), (2, 3)])
def test_what_comes_in_goes_out(paths):
    layer = drawn(4, *paths)
    x = features(4 * paths[0])
    routes = layer.routes(x)
    torch.testing.assert_close(routes.sum(2), torch.ones_like(routes.sum(2)))
    y = layer(x)
    assert y.shape[1] == 4 * paths[1]
    torch.testing.assert_close(y.unflatten(1, (-1, 4)).sum(1), x.unflatten(1, (-1, 4)).sum(1))


def test_the_ablation_weighs_over_the_incoming_paths():
    layer, x = drawn(normalize="in"), features()
    routes = layer.routes(x)
    torch.testing.assert_close(routes.sum(1), torch.ones_like(routes.sum(1)))
    low, high = x.unflatten(1, (2, 6)).amin(1), x.unflatten(1, (2, 6)).amax(1)
    y = layer(x).unflatten(1, (2, 6))
    assert bool((y >= low.unsqueeze(1) - 1e-9).all()) and bool((y <= high.unsqueeze(1) + 1e-9).all())


def test_starts_and_limits():
    x = features()
    own = CrossConnection(6, 2, dtype=torch.float64).routes(x)
    torch.testing.assert_close(own[0].diagonal(), torch.full((2,), 0.8808, dtype=torch.float64), atol=1e-4, rtol=0)
    even = CrossConnection(6, 2, init="uniform", dtype=torch.float64)
    mean = x.unflatten(1, (2, 6)).mean(1)
    torch.testing.assert_close(even(x), torch.cat([mean, mean], 1))
    apart = CrossConnection(6, 2, dtype=torch.float64)
    with torch.no_grad():
        apart.gate.bias.mul_(20)  # 40 on a path's own way
    torch.testing.assert_close(apart(x), x, atol=1e-6, rtol=0)
    assert torch.equal(drawn(12, 1)(x), x)


def test_the_gate_sees_means_only():
    layer, x = drawn(), features()
    shuffled = x.flatten(2)[..., torch.randperm(20)].view_as(x)
    torch.testing.assert_close(layer.routes(shuffled), layer.routes(x))


def test_gates_of_other_paths_do_not_matter():
    layer, x = drawn(), features()
    other = x.clone()
    other[:, 6:] += 1
    torch.testing.assert_close(layer.routes(other)[:, 0], layer.routes(x)[:, 0])
    assert float((layer.routes(other)[:, 1] - layer.routes(x)[:, 1]).abs().max()) > 1e-3


def test_published_counts():
    for channels, hidden, expected in ((16, None, 308), (32, None, 564), (64, None, 2148), (16, 4, 2 * (68 + 10))):
        assert sum(p.numel() for p in CrossConnection(channels, 2, hidden=hidden).parameters()) == expected
    torch.manual_seed(0)
    single = create_model("resnet20")
    double = multipath(create_model("resnet20"), 2)
    count = sum(p.numel() for p in single.parameters())
    shared = sum(p.numel() for part in (single.conv1, single.bn1, single.linear) for p in part.parameters())
    gates = sum(p.numel() for m in double.modules() if isinstance(m, CrossConnection) for p in m.parameters())
    assert sum(p.numel() for p in double.parameters()) == 2 * (count - shared) + shared + gates
    # From the stem (16 channels to 2 paths), behind stages one (16) and two (32).
    assert gates == (16 * 8 + 8 + 8 * 2 + 2) + 308 + 564


def test_gradients():
    x = features(4, 2)[..., :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(drawn(2), (x,))


def test_every_path_learns_from_the_start():
    torch.manual_seed(2)
    model = multipath(create_model("resnet20", num_classes=4), 3)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for paths in (m for m in model.modules() if isinstance(m, Paths)):
        norms = [max(float(p.grad.norm()) for p in path.parameters()) for path in paths]
        assert len(norms) == 3 and min(norms) > 0


def test_independent_paths_are_an_ensemble_of_features():
    torch.manual_seed(3)
    model = multipath(create_model("resnet20", num_classes=4), 2, at=()).eval()
    joined = copy.deepcopy(model)
    for index, stage in enumerate(("layer1", "layer2")):
        part = CrossConnection(32 * 2**index, 2)
        with torch.no_grad():
            part.gate.bias.mul_(20)
        setattr(joined, stage, nn.Sequential(getattr(joined, stage), part))
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(UsageError, match="expected an input"):
        joined(x)  # widths of the wrong stage
    joined.layer1[1], joined.layer2[1] = (CrossConnection(width, 2) for width in (16, 32))
    for part in (joined.layer1[1], joined.layer2[1]):
        with torch.no_grad():
            part.gate.bias.mul_(20)
    torch.testing.assert_close(joined(x), model(x), atol=1e-5, rtol=1e-5)
    stem = torch.relu(model.bn1(model.conv1(x)))
    both = []
    for path in range(2):
        y = model.layer1[1][path](stem) if isinstance(model.layer1[1], Paths) else None
        y = model.layer3[0][path](model.layer2[path](y))
        both.append(y.mean((2, 3)))
    torch.testing.assert_close(model(x), model.linear((both[0] + both[1]) / 2), atol=1e-5, rtol=1e-5)


def test_one_path_is_the_network_bit_for_bit():
    model = create_model("resnet20", seed=0).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert torch.equal(multipath(model, 1)(x), expected)


def test_paths_may_change_places():
    """The ways to two paths exchanged, together with the paths themselves."""
    torch.manual_seed(4)
    layer, paths = drawn(), Paths([nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)]).double()
    x = features()
    expected = PathMean(2)(paths(layer(x)))
    swapped = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in (swapped.gate.weight, swapped.gate.bias):
            tensor.copy_(tensor.unflatten(0, (2, 2)).flip(1).flatten(0, 1))
    found = PathMean(2)(Paths(list(paths)[::-1])(swapped(x)))
    torch.testing.assert_close(found, expected)


def test_closed_ways_in_eval():
    layer, x = drawn(threshold=0.4).eval(), features(count=16)
    routes = layer.routes(x)
    assert bool(((routes == 0) | (routes >= 0.4)).all()) and bool((routes == 0).any())
    torch.testing.assert_close(routes.sum(2), torch.ones_like(routes.sum(2)))
    assert bool((layer.train().routes(x) > 0).all())


def test_static_routing_is_a_convolution_and_goes_into_the_next_one():
    routing = StaticRouting(torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64))
    x = features(10)
    y = routing(x)
    torch.testing.assert_close(routing.as_conv(5)(x), y)
    conv = nn.Conv2d(15, 4, 3, stride=2, padding=1).double()
    made = routing.into(conv)
    assert made.in_channels == 10
    torch.testing.assert_close(made(x), conv(y))
    with pytest.raises(UsageError, match="3 whole paths"):
        routing.into(nn.Conv2d(15, 3, 3, groups=3))
    for module in (routing, drawn()):
        with pytest.raises(Stays):
            folded_form(module)


def test_frozen_routing_is_the_mean_and_reports_are_by_class():
    torch.manual_seed(5)
    model = multipath(create_model("resnet20", num_classes=4), 2).eval()
    for module in model.modules():
        if isinstance(module, CrossConnection):
            nn.init.normal_(module.gate.weight)
    images, labels = torch.randn(8, 3, 16, 16), torch.tensor([0, 0, 1, 1, 1, 3, 3, 3])
    report = route_report(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert list(report) == ["layer1.0.0", "layer1.1", "layer2.1"]
    first = next(iter(report.values()))
    assert first.shape == (4, 1, 2) and bool(torch.isnan(first[2]).all()) and not bool(torch.isnan(first[3]).any())
    name = next(iter(report))
    with collect_routes(model) as routes:
        model(images)
    expected = routes[name][0].mean(0)
    frozen = freeze_routing(model, [images])
    assert not any(isinstance(m, CrossConnection) for m in frozen.modules())
    torch.testing.assert_close(frozen.get_submodule(name).mixing, expected)
    with pytest.raises(UsageError, match="no cross-connection"):
        freeze_routing(frozen, [images])


def test_balance_is_least_when_paths_are_used_alike():
    even, one = torch.full((5, 2, 2), 0.5), torch.tensor([1.0, 0.0]).expand(5, 2, 2)
    assert float(balance_loss(even)) == pytest.approx(0.01) and float(balance_loss(one)) == pytest.approx(0.02)


def test_a_multipath_network_is_written_and_read(tmp_path):
    from convette.models import load, save
    from convette.surgery import Install, apply

    model = create_model("resnet20", seed=0)
    apply(model, Install("convette.layers.routing:multipath", {"paths": 2, "at": [1]}))
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(load(tmp_path / "model.safetensors")(x), model.eval()(x))


def test_refusals():
    with pytest.raises(UsageError, match="1 or more"):
        CrossConnection(0)
    with pytest.raises(UsageError, match="'out' or 'in'"):
        CrossConnection(4, normalize="both")
    with pytest.raises(UsageError, match="a way stays open"):
        CrossConnection(4, threshold=0.6)
    with pytest.raises(UsageError, match="expected an input"):
        drawn()(features(6))
    with pytest.raises(UsageError, match="not those of 2 paths"):
        Paths([nn.Identity(), nn.Identity()])(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UsageError, match="connections at"):
        multipath(create_model("resnet20"), at=(3,))
