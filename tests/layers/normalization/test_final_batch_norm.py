"""Final batch norm: scores it gives, folds, what drops out, the head and the transform."""

import copy

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.normalization import (
    FinalNormLinear,
    add_final_norm,
    concat_pool_head,
    remove_final_norm,
    suggests_final_norm,
)


def trained(where="logits", bias=True):
    torch.manual_seed(0)
    layer = FinalNormLinear(6, 3, bias, where=where)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2), layer.norm.bias.normal_()
    for _ in range(4):
        layer(torch.randn(32, 6) * 2 + 1)
    return layer.eval()


@pytest.mark.parametrize("where", ["logits", "features"])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_exact_and_dropping_is_not(where, bias):
    layer = trained(where, bias)
    x = torch.randn(8, 6)
    folded = layer.folded()
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), layer(x), atol=1e-5, rtol=1e-5)
    dropped = layer.dropped()
    assert dropped(x).shape == (8, 3) and not torch.allclose(dropped(x), layer(x), atol=1e-2)


def test_scores_have_the_norms_mean_and_variance():
    layer = trained().train()
    o = layer(torch.randn(64, 6)).detach()
    torch.testing.assert_close(o.mean(0), layer.norm.bias.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(o.var(0, correction=0), layer.norm.weight.detach() ** 2, atol=1e-3, rtol=1e-3)


def test_a_rare_class_gets_a_large_margin():
    layer = FinalNormLinear(1, 1).train()
    with torch.no_grad():
        layer.weight.fill_(1), layer.bias.fill_(3)
    x = torch.zeros(100, 1)
    x[0] = 1
    o = layer(x).detach()
    assert float(o[0]) == pytest.approx(9.95, abs=0.01) and float(o[1]) == pytest.approx(-0.1005, abs=0.01)


def test_the_bias_before_the_norm_does_nothing():
    layer = trained().train()
    x = torch.randn(16, 6)
    before = layer(x)
    with torch.no_grad():
        layer.bias.add_(5)
    after = layer(x)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    after.pow(3).sum().backward()
    assert float(layer.bias.grad.abs().max()) < 1e-3 and float(layer.weight.grad.abs().max()) > 0.1


def test_two_opposite_logits_stay_opposite():
    layer = FinalNormLinear(4, 2).train()
    with torch.no_grad():
        layer.weight[1] = -layer.weight[0]
    o = layer(torch.randn(16, 4))
    torch.testing.assert_close(o[:, 1], -o[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "timm:resnet18", "torchvision:resnet18"])
def test_on_networks_of_every_library(name):
    from convette.models import create_model

    torch.manual_seed(1)
    model = create_model(name, num_classes=4, stem="small", seed=0)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    add_final_norm(model, momentum=0.5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert sum(isinstance(module, FinalNormLinear) for module in model.modules()) == 1
    x = torch.randn(4, 3, 32, 32)
    model.train()(x)
    model.eval()
    expected = model(x)
    folded = remove_final_norm(copy.deepcopy(model))
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)
    assert set(folded.state_dict()) == set(weights)
    dropped = remove_final_norm(copy.deepcopy(model), "drop")
    assert set(dropped.state_dict()) == set(weights) and dropped(x).shape == (4, 4)
    with pytest.raises(UsageError, match="FinalNormLinear"):
        add_final_norm(model)


def test_surgery_folds_it():
    from convette.surgery import fold

    model = nn.Sequential(nn.Flatten(), trained()).eval()
    x = torch.randn(4, 6)
    folded = fold(model, x)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


def test_confidence_falls_and_the_rare_class_is_found():
    """A small separable task at 60:1, running statistics converged: folded, on a balanced test."""
    torch.manual_seed(2)
    x = torch.cat([torch.randn(240, 8), torch.randn(4, 8) + 1.6])
    labels = torch.cat([torch.zeros(240), torch.ones(4)]).long()
    test = torch.cat([torch.randn(200, 8), torch.randn(200, 8) + 1.6])
    recall, confidence = {}, {}
    for final in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        if final:
            add_final_norm(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if final:
            remove_final_norm(model)
        found = model(test).argmax(1)
        recall[final] = float((found[200:] == 1).float().mean())
        confidence[final] = float(model(x).softmax(1).amax(1).mean())
    assert recall[True] > recall[False] + 0.2 and confidence[True] < confidence[False]


def test_the_head():
    head = concat_pool_head(8, 3, hidden=16)
    assert isinstance(head[-1], FinalNormLinear) and head(torch.randn(4, 8, 5, 5)).shape == (4, 3)
    assert type(concat_pool_head(8, 3, final_norm=False)[-1]) is nn.Linear


def test_advice_and_refusals():
    assert suggests_final_norm([1000, 50, 0]) and not suggests_final_norm([1000, 51]) and not suggests_final_norm([9])
    with pytest.raises(UsageError, match="at least 2"):
        trained().train()(torch.randn(1, 6))
    with pytest.raises(UsageError, match="no linear"):
        add_final_norm(nn.Sequential(nn.ReLU()))
    with pytest.raises(UsageError, match="none to remove"):
        remove_final_norm(nn.Sequential(nn.Linear(2, 2)))
