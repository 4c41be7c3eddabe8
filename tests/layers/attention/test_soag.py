"""SoAG: second moments without forming them, invariances, published counts, placement, and what SE cannot see."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays
from convette.layers.attention import SoAG, add_soag


def pure(c=5, filters=6, **arguments):
    torch.manual_seed(0)
    return SoAG(c, filters, "pure", **arguments).double()


def maps(n=3, c=5, h=4, w=7):
    return torch.randn(n, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def second_moment(x, centred=False):
    rows = x.flatten(2)
    rows = rows - rows.mean(2, keepdim=True) if centred else rows
    return rows @ rows.mT / rows.shape[2]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_measurements_are_of_the_second_moment_matrix(centred, tied):
    layer, x = pure(center=centred, tied=tied), maps()
    u = layer.left.weight[:, :, 0, 0]
    t = u if tied else layer.right.weight[:, :, 0, 0]
    expected = torch.einsum("jc,ncd,jd->nj", u, second_moment(x, centred), t)
    torch.testing.assert_close(layer.statistics(x), expected, atol=1e-12, rtol=1e-12)
    if tied:
        assert bool((layer.statistics(x) >= -1e-12).all())
    single = SoAG(5, 6, "pure", center=centred, tied=tied)
    single.load_state_dict(layer.state_dict())
    torch.testing.assert_close(single.statistics(x.float()), expected.float(), atol=1e-5, rtol=1e-5)


def test_invariances_of_pure():
    layer, x = pure(), maps()
    shuffled = x.flatten(2)[..., torch.randperm(28)].view_as(x)
    torch.testing.assert_close(layer.gate(shuffled), layer.gate(x))
    torch.testing.assert_close(layer.statistics(-x), layer.statistics(x))
    torch.testing.assert_close(layer.statistics(3 * x), 9 * layer.statistics(x))


@pytest.mark.parametrize("variant", ["norm", "pure"])
def test_zero_weights_give_half(variant):
    layer, x = SoAG(5, 6, variant).double(), maps()
    nn.init.zeros_(layer.fc2.weight)
    assert torch.equal(layer(x), x / 2)
    if variant == "pure":
        layer = pure()
        nn.init.zeros_(layer.left.weight)
        assert torch.equal(layer(x), x / 2)


def test_gates_follow_the_covariance_where_means_are_equal():
    """Two maps of equal channel means; squeeze-and-excitation has one gate for both."""
    torch.manual_seed(2)
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    noise = noise - noise.mean((2, 3), keepdim=True)
    signs = torch.tensor([1, -1, 1, -1]).view(1, 4, 1, 1)
    together = 1 + noise[:, :1].expand(1, 4, 8, 8)
    apart = 1 + noise[:, :1] * signs
    torch.testing.assert_close(together.mean((2, 3)), apart.mean((2, 3)))
    for layer in (pure(4), pure(4, center=True), SoAG(4, 8).double().eval()):
        assert float((layer.gate(together) - layer.gate(apart)).abs().max()) > 1e-3


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, 16), nn.ReLU(), nn.Linear(16, channels), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.gate(x.mean((2, 3)))[..., None, None]


def test_textures_of_equal_means_are_told_apart_where_squeeze_and_excitation_cannot():
    """Synthetic: 1 + noise, every channel centred; the classes differ in how channels correlate."""

    def textures(count, generator):
        labels = torch.arange(count) % 2
        shared = torch.randn(count, 1, 8, 8, generator=generator)
        signs = torch.where(labels.view(-1, 1, 1, 1) == 1, 1.0, torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1))
        noise = shared * signs + 0.5 * torch.randn(count, 4, 8, 8, generator=generator)
        return 1 + noise - noise.mean((2, 3), keepdim=True), labels

    generator = torch.Generator().manual_seed(0)
    (x, y), (test, wanted) = textures(256, generator), textures(256, generator)
    scores = {}
    for name in ("se", "soag"):
        torch.manual_seed(1)
        gate = SqueezeExcitation(4) if name == "se" else SoAG(4, 16)
        model = nn.Sequential(gate, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        scores[name] = float((model.eval()(test).argmax(1) == wanted).float().mean())
    assert scores["soag"] > 0.9 and abs(scores["se"] - 0.5) < 0.15, scores


@pytest.mark.parametrize(("c", "filters", "expected"), [(16, 64, 4992), (64, 64, 12_672), (64, 512, 216_064)])
def test_parameters(c, filters, expected):
    assert sum(p.numel() for p in SoAG(c, filters).parameters()) == expected
    assert sum(p.numel() for p in SoAG(c, filters, "pure").parameters()) == expected - 6 * filters
    assert SoAG(16).left.out_channels == 64 and SoAG(64).left.out_channels == 128


def test_macs_are_those_of_the_two_convolutions():
    from convette.cost import count

    assert count(SoAG(16, 32), torch.randn(1, 16, 8, 8)).macs == 2 * 16 * 32 * 64 + 32 * 16 + 16 * 16


def test_gradients_and_bounds():
    layer = pure(3, 4)
    x = maps(2, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    assert bool((layer(x).abs() <= x.abs()).all()) and layer(x).shape == x.shape
    flat = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    layer(flat).sum().backward()
    assert bool(torch.isfinite(flat.grad).all())


def test_folds_its_norms():
    from convette.surgery import fold

    torch.manual_seed(3)
    layer = SoAG(5, 6)
    for _ in range(3):
        layer(maps().float() * 2)
    x = maps().float()
    model = nn.Sequential(layer).eval()
    folded = fold(model, x)
    assert isinstance(folded[0].norm_left, nn.Identity) and isinstance(folded[0].norm_right, nn.Identity)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(Stays, match="gate"):
        layer.folded()


@pytest.mark.parametrize(
    ("name", "where", "count"),
    [
        ("resnet20", "stage", 3),
        ("resnet20", "block", 9),
        ("timm:resnet18", "block", 8),
        ("torchvision:mobilenet_v2", "stage", 5),
        ("torchvision:resnet18", ["layer3", "layer4.0.bn2"], 2),
    ],
)
def test_added_to_networks(name, where, count, tmp_path):
    from convette.models import create_model, load, save

    model = create_model(name, num_classes=3, seed=0)
    x = torch.randn(2, 3, 64, 64)
    add_soag(model, x, where, 8)
    assert sum(isinstance(m, SoAG) for m in model.modules()) == count
    if name == "resnet20":
        model(x).sum().backward()
        save(model.eval(), tmp_path / "m.safetensors")
        assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))


def test_refusals():
    with pytest.raises(UsageError, match="pure"):
        SoAG(4, center=True)
    with pytest.raises(UsageError, match="at least 2"):
        SoAG(4)(torch.randn(1, 4, 1, 1))
    with pytest.raises(UsageError, match="no positions"):
        SoAG(4)(torch.randn(2, 4, 0, 3))
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    with pytest.raises(UsageError, match="example"):
        add_soag(net, where=["0"])
    with pytest.raises(UsageError, match="no module 'x'"):
        add_soag(net, torch.randn(1, 1, 2, 2), ["x"])
    with pytest.raises(UsageError, match="residual block"):
        add_soag(net, torch.randn(1, 1, 2, 2), "block")
    with pytest.raises(UsageError, match="not maps"):
        add_soag(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2), ["0"])
