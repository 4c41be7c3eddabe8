import copy
import dataclasses
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette import models
from convette.data import MemorySplit, load_data
from convette.errors import FileFormatError, UsageError
from convette.models.cell_network import CellNetwork
from convette.pipeline.fit import train_run
from convette.pipeline.recipe import build_recipe
from convette.pruning.dass import (
    CellNet,
    DASSSettings,
    Genotype,
    SparseConv2d,
    SparseLinear,
    candidate_operations,
    masks_fixed,
    masks_off,
    search,
    sparse_modules,
    to_sparse,
)
from convette.pruning.dass.cells import OPERATIONS
from convette.pruning.dass.search import _step, collapsed, phase_of
from convette.pruning.methods.dass import ScoreMasks, first_scores
from convette.pruning.sparsity import unstructured_mask
from convette.surgery import Origin, apply, trace
from convette.training import Event, Method, TrainSettings, train


@pytest.fixture(scope="module")
def few():
    """A few digits: a supernet of all operations is slow."""
    data = load_data("digits")
    train = MemorySplit("train", data.train.images(slice(0, 64)), data.train.labels[:64], data.num_classes)
    return dataclasses.replace(data, train=train)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
def test_exactly_the_share_is_masked_and_magnitude_comes_first(sparsity):
    torch.manual_seed(0)
    layer = SparseConv2d(6, 8, 3, padding=1, sparsity=sparsity)
    assert int(layer.mask().sum()) == round((1 - sparsity) * layer.weight.numel())
    left, gone = layer.weight.abs()[layer.mask()], layer.weight.abs()[~layer.mask()]
    assert not len(gone) or left.min() >= gone.max()
    with torch.no_grad():
        layer.scores.fill_(1.0)
    if sparsity:
        flat = layer.mask().flatten()
        assert flat[: int(flat.sum())].all()  # ties go by index


def test_without_sparsity_it_is_the_dense_layer_bit_for_bit():
    torch.manual_seed(0)
    sparse, x = SparseConv2d(3, 4, 3, stride=2, padding=1, sparsity=0.0), torch.randn(2, 3, 8, 8)
    assert torch.equal(sparse(x), F.conv2d(x, sparse.weight, sparse.bias, 2, 1))
    assert torch.equal(sparse.to_dense()(x), sparse(x))
    linear = SparseLinear(5, 7, sparsity=0.6)
    y = torch.randn(3, 5)
    assert torch.equal(linear.to_dense()(y), linear(y))
    assert int((linear.to_dense().weight != 0).sum()) == round(0.4 * 35)


def test_scores_of_masked_weights_get_gradients_masked_weights_none():
    torch.manual_seed(0)
    layer = SparseConv2d(3, 4, 3, sparsity=0.8)
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    mask = layer.mask()
    assert (layer.scores.grad[~mask] != 0).all()
    assert (layer.weight.grad[~mask] == 0).all() and (layer.weight.grad[mask] != 0).any()
    # dL/dS = dL/d(WM) W, and dL/dW is the same gradient under the mask.
    assert torch.allclose(layer.scores.grad[mask], layer.weight.grad[mask] * layer.weight.detach()[mask], atol=1e-5)


def test_phases_leave_alone_what_they_are_not_about(few):
    torch.manual_seed(0)
    data = few
    net = CellNet(4, 1, in_channels=1, sparsity=0.8)
    batch = torch.arange(16)
    weights = {id(p): p.detach().clone() for p in net.weight_parameters()}
    scores = torch.optim.SGD(net.score_parameters(), 0.1)
    before = [layer.mask() for layer in sparse_modules(net)]
    for _ in range(2):
        _step(net, data, batch, scores, 5.0)
    assert all(torch.equal(weights[id(p)], p.detach()) for p in net.weight_parameters())
    assert any(not torch.equal(a, layer.mask()) for a, layer in zip(before, sparse_modules(net), strict=True))
    learner = torch.optim.SGD(net.weight_parameters(), 0.1)
    with masks_fixed(net):
        before = [layer.mask() for layer in sparse_modules(net)]
        _step(net, data, batch, learner, 5.0)
        with torch.no_grad():
            for parameter in net.score_parameters():
                parameter.neg_().add_(1)
        assert all(torch.equal(a, layer.mask()) for a, layer in zip(before, sparse_modules(net), strict=True))
    assert any(not torch.equal(weights[id(p)], p.detach()) for p in net.weight_parameters())


def test_a_cell_has_two_inputs_a_node_and_never_none():
    net = CellNet(4, 3, in_channels=1)
    with torch.no_grad():
        net.normal_alpha[:, candidate_operations().index("none")] = 10.0
    found = net.genotype()
    for cell in (found.normal, found.reduction):
        assert len(cell) == 8 and all(name != "none" for name, _ in cell)
        for node in range(4):
            sources = [source for _, source in cell[2 * node : 2 * node + 2]]
            assert len(set(sources)) == 2 and max(sources) < node + 2
    assert torch.allclose(net.normal_alpha.softmax(1).sum(1), torch.ones(14))
    small = CellNet(4, 3, in_channels=1, genotype=found)
    assert small(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UsageError):
        small.genotype()
    with pytest.raises(UsageError):
        Genotype((("none", 0),) * 8, found.reduction)


def test_a_separable_convolution_has_the_published_parameters():
    layer = OPERATIONS["sep_conv_3x3"](16, 1, partial(SparseConv2d, sparsity=0.5))
    names = [(n, p) for n, p in layer.named_parameters() if not n.endswith("scores")]
    convolutions = sum(p.numel() for n, p in names if p.ndim == 4)
    assert convolutions == 2 * (9 * 16 + 16 * 16)
    left = sum(int(module.mask().sum()) for module in sparse_modules(layer))
    assert left == 2 * 128  # the pointwise ones at half; depthwise stay dense


def test_without_sparsity_a_step_is_that_of_a_plain_network(few):
    """One step of the operations and one of the weights, as DARTS of first order makes them with plain layers."""
    torch.manual_seed(0)
    sparse = CellNet(4, 1, in_channels=1, sparsity=0.0)
    plain = CellNetwork(4, 1, in_channels=1)
    plain.load_state_dict({name: v for name, v in sparse.state_dict().items() if not name.endswith("scores")})
    first, second = torch.arange(6), torch.arange(6, 12)
    sparse.train()
    plain.train()
    for net, weights in ((sparse, sparse.weight_parameters()), (plain, None)):
        chosen = {id(parameter) for parameter in net.architecture()}
        weights = weights or [p for p in net.parameters() if id(p) not in chosen]
        for parameters, batch in ((net.architecture(), second), (weights, first)):
            optimizer = torch.optim.SGD(parameters, 0.1)
            if net is sparse:
                _step(net, few, batch, optimizer, 5.0)
                continue
            net.zero_grad()
            images = few.preprocessing(few.train.images(batch))
            F.cross_entropy(net(images), few.train.labels[batch]).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value), name


def test_a_search_that_collapses_to_skips_ends_with_the_cells_before(few, monkeypatch):
    convolutions = Genotype((("sep_conv_3x3", 0), ("sep_conv_3x3", 1)) * 4, (("skip", 0), ("skip", 1)) * 4)
    skips = Genotype((("skip", 0), ("skip", 1)) * 4, convolutions.reduction)
    assert collapsed(skips, 2) and not collapsed(convolutions, 2) and not collapsed(skips, None)
    seen = iter([convolutions, convolutions, convolutions, skips, skips])
    monkeypatch.setattr(CellNet, "genotype", lambda self: next(seen))
    monkeypatch.setattr(sys.modules[collapsed.__module__], "_step", lambda *args: 0.0)
    settings = DASSSettings(0.5, 4, 1, 4, 64, dense_share=0.0, mask_share=0.5, most_skips=2)
    found = search(few, settings)
    assert found.genotype == convolutions and len(found.history) == 3


def test_a_search_goes_through_its_phases(few):
    settings = DASSSettings(
        sparsity=0.8, channels=4, cells=1, epochs=4, batch_size=32, dense_share=0.25, mask_share=0.5
    )
    assert [phase_of(epoch, settings) for epoch in range(4)] == ["weights", "masks", "masks", "masked weights"]
    result = search(few, settings)
    assert [phase for phase, _ in result.history] == ["weights", "masks", "masks", "masked weights"]
    assert result.model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    for wrong in ({"sparsity": 1.0}, {"epochs": 0}, {"dense_share": 0.6, "mask_share": 0.4}):
        with pytest.raises(UsageError):
            DASSSettings(**wrong)


def test_any_network_takes_sparse_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4)
    ).eval()
    x, dense = torch.randn(2, 2, 8, 8), copy.deepcopy(model)
    sparse = to_sparse(model, 0.5)
    assert [type(m) for m in sparse] == [SparseConv2d, nn.ReLU, nn.Conv2d, nn.Flatten, SparseLinear]
    with masks_off(sparse):
        assert torch.equal(sparse(x), dense(x))
    assert not torch.equal(sparse(x), dense(x))
    with pytest.raises(UsageError):
        SparseLinear(4, 4, sparsity=1.0)


def test_scores_learn_while_weights_rest_and_masks_are_kept_to_the_end(few, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    seen: list = []

    class Watch(Method):
        name = "watch"
        order = -100
        events = frozenset({Event.AFTER_OPTIMIZER_STEP})

        def apply(self, event, trainer):
            weight = trainer.state.model[2].weight.detach().clone()
            scores = method.scores.get("2.weight")
            seen.append((weight, None if scores is None else scores.clone(), bool(method.masks)))

    method = ScoreMasks(0.75, dense_share=0.25, mask_share=0.5, score_rate=1.0)
    settings = TrainSettings(epochs=4, batch_size=16, augmentation=(), precision="fp32", ema_decay=0.5)
    trained = train(model, few, settings, methods=(method, Watch()), device="cpu").model
    rest = [(weight, scores) for weight, scores, settled in seen if scores is not None and not settled]
    assert 0 < len(rest) < len(seen)
    assert all(torch.equal(weight, rest[0][0]) for weight, _ in rest)  # bit for bit
    assert not torch.equal(rest[0][1], rest[-1][1])
    masks = {name: weight.detach() != 0 for name, weight in trained.named_parameters() if weight.ndim == 4}
    for name in ("2.weight", "5.weight"):
        assert int(masks[name].sum()) == round(0.25 * masks[name].numel())
        assert torch.equal(masks[name], method.masks[name])
    assert masks["0.weight"].all() and (trained[8].weight != 0).all()  # the ends stay dense
    assert type(trained[2]) is nn.Conv2d
    first = first_scores(model[2].weight.detach())
    assert torch.equal(unstructured_mask(first.abs(), 0.5), unstructured_mask(model[2].weight.detach().abs(), 0.5))
    for wrong in ({"sparsity": 1.0}, {"dense_share": 0.8, "mask_share": 0.3}):
        with pytest.raises(UsageError):
            ScoreMasks(**wrong)
    with pytest.raises(UsageError, match="no inner one"):
        train(model, few, settings, methods=(ScoreMasks(exclude=("*",)),), device="cpu")


def test_a_plain_network_of_cells_is_saved_and_read_back(tmp_path):
    torch.manual_seed(0)
    found = CellNet(4, 3, in_channels=1).genotype()
    assert Genotype.from_numbers(**found.numbers()) == found
    model = CellNetwork(4, 3, in_channels=1, num_classes=5, genotype=found).eval()
    x = torch.randn(2, 1, 8, 8)
    models.save(model, tmp_path / "a.safetensors")
    assert torch.equal(models.load(tmp_path / "a.safetensors")(x), model(x))
    graph = trace(model, x[:1])
    apply(model, graph.shrink({g.name: torch.arange(max(1, g.size // 2)) for g in graph.groups}))
    models.save(model, tmp_path / "b.safetensors")
    assert torch.equal(models.load(tmp_path / "b.safetensors")(x), model(x))
    for wrong in ([9, 1] * 8, [1, 6] * 8, [1, 1]):
        with pytest.raises(FileFormatError, match="cell_network"):
            models.build_from_origin(Origin("convette:cell_network", {"normal": wrong}))


def test_a_recipe_searches_trains_sparse_and_ships(tmp_path):
    options = {"sparsity": 0.8, "channels": 4, "cells": 1, "epochs": 1, "batch_size": 512, "dense_share": 0.0}
    tables = {
        "data": {"source": "digits"},
        "model": {"name": "dass", "options": {**options, "mask_share": 0.5}},
        "train": {"epochs": 2, "batch_size": 256, "augmentation": [], "precision": "fp32"},
    }
    result = train_run(build_recipe(tables), out=tmp_path / "run")
    model = models.load(result.files["model"])
    inner = [m.weight for m in model.cells.modules() if type(m) is nn.Conv2d and m.groups == 1]
    assert inner and all(int((w != 0).sum()) == round(0.2 * w.numel()) for w in inner)
    for wrong in ({"name": "dass", "options": {"sparsty": 0.9}}, {"name": "resnet20", "options": {"sparsity": 0.9}}):
        with pytest.raises(UsageError, match=r"model\.options"):
            build_recipe({"model": wrong})
    with pytest.raises(UsageError, match="sparsity"):
        build_recipe({"model": {"name": "dass", "options": {"sparsity": 2.0}}})
