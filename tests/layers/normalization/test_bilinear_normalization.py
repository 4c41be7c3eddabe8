"""BiN and TABL: published counts, standardised rows and columns, invariances, attention, projections, folds."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import BL, TABL, BilinearNorm, BilinearNorm2d, fold_shift, tabl


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_counts():
    assert count(BilinearNorm(40, 10)) == 102
    found = {name: (count(tabl(name, norm=None)), count(tabl(name))) for name in ("A", "B", "C")}
    assert found == {"A": (234, 336), "B": (5_844, 5_946), "C": (11_344, 11_446)}


def norm(y1, y2, d=6, t=5):
    layer = BilinearNorm(d, t).double()
    with torch.no_grad():
        layer.mix.copy_(torch.tensor([y1, y2]))
    return layer


def test_rows_and_columns_are_standardised():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, dtype=torch.float64) * 3 + 2
    rows, columns = norm(0, 1)(x), norm(1, 0)(x)
    for y, axis in ((rows, 2), (columns, 1)):
        torch.testing.assert_close(y.mean(axis), torch.zeros_like(y.mean(axis)), atol=1e-9, rtol=0)
        torch.testing.assert_close(y.std(axis), torch.ones_like(y.std(axis)))


def test_invariances():
    torch.manual_seed(1)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    a, b = torch.rand(6, 1).double() + 0.5, torch.randn(6, 1).double()
    torch.testing.assert_close(norm(0, 1)(a * x + b), norm(0, 1)(x))
    a, b = torch.rand(1, 5).double() + 0.5, torch.randn(1, 5).double()
    torch.testing.assert_close(norm(1, 0)(a * x + b), norm(1, 0)(x))


def test_constant_rows_and_columns_are_0():
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    x[:, 2] = 7.0
    x[:, :, 1] = 3.0
    x[:, 2] = 7.0
    x.requires_grad_()
    y = norm(0, 1)(x)
    assert float(y[:, 2].abs().max()) < 1e-12
    flat = torch.full((2, 6, 5), 4.0, dtype=torch.float64, requires_grad=True)
    for layer in (norm(1, 0), norm(0.5, 0.5)):
        z = layer(flat)
        assert float(z.abs().max()) < 1e-12
        z.sum().backward()
        assert bool(torch.isfinite(flat.grad).all())


def test_gradcheck():
    torch.manual_seed(2)
    layer = norm(0.4, 0.7).eval()
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_negative_weights_are_projected_in_place():
    layer = BilinearNorm(4, 3)
    parameter = layer.mix
    with torch.no_grad():
        parameter.copy_(torch.tensor([-1.0, 0.3]))
    layer.train()(torch.randn(2, 4, 3))
    assert layer.mix is parameter and layer.mix.tolist() == pytest.approx([0, 0.3])
    reference = BilinearNorm(4, 3, floor=0.01, init="xavier")
    with torch.no_grad():
        reference.mix[0] = -1
    reference.project()
    assert float(reference.mix[0]) == pytest.approx(0.01) and float(reference.lam1.min()) < 1


def test_bl_is_its_equation():
    torch.manual_seed(3)
    layer, x = BL((6, 5), (4, 3), activation=False), torch.randn(2, 6, 5)
    expected = torch.einsum("ed,ndt,tf->nef", layer.w1, x, layer.w2) + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert float(BL((6, 5), (4, 3))(x).min()) >= 0


def test_attention():
    torch.manual_seed(4)
    layer, x = TABL((6, 5), (3, 1)).double(), torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.attention(x).sum(2), torch.ones(2, 3).double())
    with torch.no_grad():
        layer.lam.fill_(1)
    torch.testing.assert_close(layer(x), layer.w1 @ x @ layer.w2 + layer.bias)
    with torch.no_grad():
        layer.w.zero_(), layer.lam.fill_(0.3)
    torch.testing.assert_close(layer.attention(x), torch.softmax(layer.w1 @ x / 5, -1))
    layer(x).square().sum().backward()
    assert float(layer.w.grad.diagonal().abs().max()) == 0 and float(layer.w.grad.abs().max()) > 0


def test_projections_of_the_network():
    model = tabl("B", (6, 5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("w1", "w2", "w"):
                parameter.fill_(9.0)
        model.head.lam.fill_(1.7)
    model(torch.randn(1, 6, 5))
    assert float(model.head.lam.detach()) == 1
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("w1", "w2", "w"):
            assert float(parameter.detach().norm()) == pytest.approx(10, abs=1e-4)


def test_a_batch_of_one_stays_a_batch():
    for template in ("A", "B", "C"):
        assert tabl(template)(torch.randn(1, 40, 10)).shape == (1, 3)


def test_shifts_fold_into_the_next_layer():
    torch.manual_seed(5)
    model = tabl("B", (6, 5)).eval()
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.add_(torch.rand_like(parameter))
    x = torch.randn(3, 6, 5)
    expected = model(x)
    fold_shift(model.norm, model.layers[0])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert float(model.norm.shift1.abs().max()) == 0
    with pytest.raises(UsageError, match="fold_shift"):
        fold_shift(BilinearNorm(3, 3), model.layers[0])


def test_maps_are_normalised_channel_by_channel():
    x = torch.randn(2, 3, 6, 5)
    y = BilinearNorm2d(6, 5)(x)
    torch.testing.assert_close(y[:, 1], BilinearNorm(6, 5)(x[:, 1]))


def test_it_undoes_a_change_of_scale_that_breaks_the_plain_network():
    """Rows with gains and offsets of their own: the sheet's experiment in miniature, on digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:600], dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target[:600])
    generator = torch.Generator().manual_seed(0)

    def shifted(images, strength):
        noise = torch.randn(2, len(images), 8, 1, generator=generator)
        return images * (0.5 * strength * noise[0]).exp() + 0.5 * strength * noise[1]

    accuracy = {}
    for kind in (None, "bin"):
        torch.manual_seed(0)
        model = tabl("B", (8, 8), 10, norm=kind, dropout=0.0).train()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(6):
            for part in torch.randperm(500, generator=generator).split(50):
                loss = nn.functional.cross_entropy(model(shifted(x[part], 1)), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found = model.eval()(shifted(x[500:], 2)).argmax(1)
        accuracy[kind] = float((found == labels[500:]).float().mean())
    assert accuracy["bin"] > accuracy[None] + 0.1


def test_refusals():
    with pytest.raises(UsageError, match="transpose"):
        BilinearNorm(40, 10)(torch.randn(2, 10, 40))
    with pytest.raises(UsageError, match="features"):
        BilinearNorm(0, 10)
