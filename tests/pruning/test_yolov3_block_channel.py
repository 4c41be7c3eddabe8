import copy
import math

import pytest
import torch
from tests.pruning.conftest import Deep
from torch import nn

from convette.cost import count, count_parameters
from convette.data import load_data
from convette.errors import StructureError, UsageError
from convette.pruning import bn_scale, l1, score_units
from convette.pruning.yolov3_block_channel import (
    ANCHORS,
    BlockChannelSettings,
    SparseFactors,
    YOLOLoss,
    YOLOv3,
    assigned_anchors,
    block_then_channel,
    box_overlap,
    branch_norms,
    class_weights,
    decode,
    detections,
    fold_factors,
    mean_average_precision,
    soft_threshold,
)
from convette.pruning.yolov3_block_channel.rounds import smallest_factors
from convette.surgery import apply, remove, trace
from convette.training import TrainSettings, train

QUICK = TrainSettings(batch_size=128, learning_rate=0.05, augmentation=(), precision="fp32")


def test_the_detector_has_the_published_counts():
    with torch.device("meta"):
        model = YOLOv3().eval()
    assert count_parameters(model) == 61_949_149
    backbone = sum(count_parameters(part) for part in (model.stem, model.stages))
    assert backbone == 40_584_928
    cost = count(model, torch.zeros(1, 3, 416, 416, device="meta"))
    assert cost.macs == pytest.approx(32.93e9, rel=2e-3)


def test_maps_and_boxes_have_the_published_shapes():
    model = YOLOv3(num_classes=3, width=0.05).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64))
    assert [tuple(one.shape) for one in maps] == [(1, 24, 2, 2), (1, 24, 4, 4), (1, 24, 8, 8)]
    boxes = decode(maps, 64, 3)
    assert boxes.shape == (1, 3 * (4 + 16 + 64), 8) and (boxes[..., 2:4] > 0).all()
    assert 3 * (13**2 + 26**2 + 52**2) == 10_647


def test_channels_behind_the_concatenation_are_the_readers_columns():
    torch.manual_seed(0)
    model = YOLOv3(num_classes=2, width=0.05).eval()
    example = torch.randn(1, 3, 64, 64)
    graph = trace(model, example)
    assert not graph.frozen
    reader = model.heads[1].body[0][0]
    route = model.routes[0][0].out_channels
    group = next(g for g in graph.groups if any(m.parameter == "routes.0.0.weight" for m in g.of("producer")))
    columns = next(m.index for m in group.of("consumer") if m.parameter == "heads.1.body.0.0.weight")
    assert sorted(columns.flatten().tolist()) == list(range(route))
    kept = {g.name: torch.arange(max(1, g.size // 2)) for g in graph.groups}
    before = reader.in_channels
    apply(model, graph.shrink(kept))
    assert reader.in_channels < before
    assert [m.shape[1] for m in model(example)] == [21, 21, 21]
    assert l1(model, trace(model, example))


def test_a_factor_of_one_changes_nothing_zero_is_leaving_out_and_folding_is_exact():
    torch.manual_seed(0)
    model = YOLOv3(num_classes=2, width=0.05).eval()
    example = torch.randn(1, 3, 64, 64)
    norms = branch_norms(model, example)
    assert len(norms) == 23 and all(name.endswith("second.1") for name in norms.values())
    with torch.no_grad():
        before = model(example)
        same = copy.deepcopy(model)
        fold_factors(same, dict.fromkeys(norms.values(), 1.0))
        assert all(torch.equal(a, b) for a, b in zip(before, same(example), strict=True))
        block, norm = next(iter(norms.items()))
        gone, zero = copy.deepcopy(model), copy.deepcopy(model)
        apply(gone, remove(gone, block, example))
        fold_factors(zero, {norm: 0.0})
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gone(example), zero(example), strict=True))
        scaled, folded = copy.deepcopy(model), copy.deepcopy(model)
        scaled.get_submodule(norm).register_forward_hook(lambda module, inputs, output: output * -0.4)
        fold_factors(folded, {norm: -0.4})
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(scaled(example), folded(example), strict=True))
    with pytest.raises(StructureError, match="no batch norm"):
        fold_factors(model, {"stem.0": 1.0})


def test_the_proximal_step_makes_exact_zeros():
    x = torch.tensor([-1.0, -0.05, 0.0, 0.1, 0.5])
    assert soft_threshold(x, 0.1).tolist() == pytest.approx([-0.9, 0.0, 0.0, 0.0, 0.4])
    assert int((soft_threshold(x, 0.1) == 0).sum()) == 3


def test_weights_of_classes_average_to_one():
    weights = class_weights([10, 100, 1000])
    assert float(weights.mean()) == pytest.approx(1.0) and weights[0] > weights[1] > weights[2]
    assert torch.allclose(class_weights([7, 7, 7]), torch.ones(3))
    with pytest.raises(UsageError):
        class_weights([3, 0])


def test_sparse_training_shrinks_factors_and_scales_and_folds():
    data = load_data("digits")
    torch.manual_seed(0)
    model, example = Deep(3), data.preprocessing(data.train.images([0]))
    before = sum(float(m.weight.detach().abs().sum()) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    method = SparseFactors(0.5, 0.1)
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 1})
    trained = train(model, data, settings, methods=(method,), device="cpu").model
    assert set(method.factors) == {"blocks.0", "blocks.1", "blocks.2"}
    assert all(abs(value) < 0.95 for value in method.factors.values())
    after = sum(float(m.weight.detach().abs().sum()) for m in trained.modules() if isinstance(m, nn.BatchNorm2d))
    assert after < before and not any(m._forward_hooks for m in trained.modules())
    assert trained(example).shape == (1, 10)
    with pytest.raises(StructureError, match="no residual block"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, settings, methods=(SparseFactors(),), device="cpu")
    with pytest.raises(UsageError):
        SparseFactors(-1.0)


def test_one_block_of_a_stage_stays():
    factors = {"a.0": 0.1, "a.1": 0.2, "b.0": 0.05, "c.0": 0.9, "c.1": 0.8, "c.2": 0.7}
    assert smallest_factors(factors, 0.5, float("inf")) == ("a.0", "c.2", "c.1")
    assert smallest_factors(factors, 0.5, 0.5) == ("a.0",)
    assert smallest_factors(factors, 0.0, 1.0) == ()


def test_a_channel_of_a_stream_stays_if_any_layer_needs_it():
    torch.manual_seed(0)
    model = YOLOv3(num_classes=2, width=0.05).eval()
    example = torch.randn(1, 3, 64, 64)
    graph = trace(model, example)
    group = max(graph, key=lambda one: len(one.of("affine")))
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    names = [m.parameter for m in group.of("affine") if m.parameter.endswith("weight") and m.module in norms]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).fill_(0.1)
        model.get_parameter(names[0])[0] = 0.9  # one layer needs channel 0, all others a little of channel 1
        for name in names[1:]:
            model.get_parameter(name)[1] = 0.5
    found = {how: bn_scale(model, graph, reduce=how)[group.name] for how in ("max", "mean", "min", "sum")}
    assert found["max"][0] == pytest.approx(0.9) and found["max"][1] == pytest.approx(0.5)
    assert found["mean"][0] < found["mean"][1] and found["min"][:2].tolist() == pytest.approx([0.1, 0.1])
    assert torch.allclose(found["sum"], len(names) * found["mean"])
    with pytest.raises(UsageError, match="reduce = 'most'"):
        score_units("bn_scale", model, graph, options={"reduce": "most"})
    with pytest.raises(UsageError, match="tied = 'most'"):
        BlockChannelSettings(tied="most")


def test_rounds_end_within_the_budget_with_blocks_and_channels_gone():
    data = load_data("digits")
    torch.manual_seed(0)
    model, example = Deep(4), data.preprocessing(data.train.images([0]))
    settings = BlockChannelSettings(rounds=2, sparse_epochs=1, epochs=1, block_share=0.25)
    found = block_then_channel(model, data, "macs<=30%", settings, train_settings=QUICK)
    assert found.macs[-1] <= 0.3 * found.macs[0] and list(found.macs) == sorted(found.macs, reverse=True)
    assert len(found.blocks[0]) == 1 and set(found.blocks[0]) <= set(found.factors[0])
    assert found.model(example).shape == (1, 10) and isinstance(model.blocks[0].first, nn.Conv2d)
    with pytest.raises(UsageError, match="counts"):
        block_then_channel(model, data, "latency<=1ms", settings)
    for wrong in ({"rounds": 0}, {"block_share": 2.0}):
        with pytest.raises(UsageError):
            BlockChannelSettings(**wrong)


SMALL = tuple(tuple((w / 4, h / 4) for w, h in level) for level in ANCHORS)


def test_boxes_belong_to_the_anchor_of_their_shape():
    shapes = [shape for level in ANCHORS for shape in level]
    boxes = torch.tensor([[0, 50, 50, *shape] for shape in shapes], dtype=torch.float32)
    levels, anchors = assigned_anchors(boxes)
    assert levels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and anchors.tolist() == [0, 1, 2] * 3
    one, other = torch.tensor([[10.0, 10, 4, 4]]), torch.tensor([[12.0, 10, 4, 4], [30, 30, 4, 4], [10, 10, 4, 4]])
    assert box_overlap(one, other)[0].tolist() == pytest.approx([1 / 3, 0, 1])


def perfect(boxes: torch.Tensor, sure: float = 12.0) -> list[torch.Tensor]:
    """Return the maps of one image that say these boxes, of two classes, on 64 pixels."""
    maps = [torch.zeros(1, 3, 7, side, side) for side in (2, 4, 8)]
    for one in maps:
        one[:, :, 4:] = -sure
    for row, level, anchor in zip(boxes, *assigned_anchors(boxes, SMALL), strict=True):
        stride = 64 / maps[level].shape[-1]
        at = (row[1:3] / stride).long()
        place = maps[level][0, anchor, :, at[1], at[0]]
        place[:2] = torch.logit(row[1:3] / stride - at, eps=1e-6)
        place[2:4] = (row[3:] / torch.tensor(SMALL[level][anchor])).log()
        place[4] = place[5 + int(row[0])] = sure
    return [one.flatten(1, 2) for one in maps]


BOXES = torch.tensor([[0.0, 20, 24, 30, 24], [1, 44, 40, 8, 15], [1, 10, 50, 4, 6]])


def test_the_loss_is_least_where_the_maps_say_the_boxes_and_evaluation_finds_them():
    maps, loss = perfect(BOXES), YOLOLoss(64, 2, SMALL)
    least = 0.0  # the entropy of where centres lie in their cells is what cannot go
    for box, stride in zip(BOXES, (32, 16, 8), strict=True):
        offset = box[1:3] / stride % 1
        entropy = torch.special.entr(offset) + torch.special.entr(1 - offset)
        least += float((2 - box[3] * box[4] / 64**2) * entropy.sum())
    assert float(loss(maps, [BOXES])) == pytest.approx(least, abs=2e-3)
    moved = [one.clone().requires_grad_() for one in maps]
    loss(moved, [BOXES]).backward()
    assert max(float(one.grad.abs().max()) for one in moved) < 1e-3
    found = detections(maps, 64, 2, anchors=SMALL)
    assert mean_average_precision(found, [BOXES], 2) == pytest.approx(1.0) and len(found[0]) == 3
    assert box_overlap(found[0][:, :4], BOXES[:, 1:]).amax(0).min() > 0.99
    for wrong in ([BOXES, BOXES], [BOXES[:, :4]]):
        with pytest.raises(UsageError, match="YOLOLoss"):
            loss(maps, wrong)


def test_near_misses_are_no_negatives_focal_spares_the_sure_and_rare_classes_weigh_more():
    maps = perfect(BOXES[:1])
    near = [one.clone() for one in maps]
    split = near[0].view(3, 7, 2, 2)
    own = int(assigned_anchors(BOXES[:1], SMALL)[1])
    other = (own + 1) % 3
    split[other, :4, 0, 0] = split[own, :4, 0, 0]  # the same box, said by an anchor that it does not belong to
    split[other, 2:4, 0, 0] = (BOXES[0, 3:] / torch.tensor(SMALL[0][other])).log()
    split[other, 4, 0, 0] = 12.0
    ignoring, strict = YOLOLoss(64, 2, SMALL), YOLOLoss(64, 2, SMALL, ignore=2.0)
    assert float(strict(near, [BOXES[:1]]) - ignoring(near, [BOXES[:1]])) == pytest.approx(12.0, abs=0.1)
    unsure = [torch.zeros_like(one) for one in maps]
    plain, focal = ignoring, YOLOLoss(64, 2, SMALL, focal=True)
    nothing = [torch.zeros(0, 5)]
    places = 3 * (4 + 16 + 64)
    assert float(plain(unsure, nothing)) == pytest.approx(places * math.log(2), rel=1e-5)
    assert float(focal(unsure, nothing)) == pytest.approx(places * 0.5 * 0.25 * math.log(2), rel=1e-5)
    weights = class_weights([900, 10])
    weighted, even = YOLOLoss(64, 2, SMALL, class_weights=weights), YOLOLoss(64, 2, SMALL, class_weights=torch.ones(2))
    assert float(even(unsure, [BOXES])) == pytest.approx(float(plain(unsure, [BOXES])))
    assert float(weighted(unsure, [BOXES[1:2]])) > float(plain(unsure, [BOXES[1:2]])) > 0
    assert float(weighted(unsure, [BOXES[:1]])) < float(plain(unsure, [BOXES[:1]]))


def test_precision_by_hand():
    """Two true boxes, three detections: right, wrong, right: 1/2 (1 + 2/3)."""
    truth = [torch.tensor([[0.0, 10, 10, 8, 8], [0, 40, 40, 8, 8]])]
    found = [torch.tensor([[10.0, 10, 8, 8, 0.9, 0], [25, 25, 8, 8, 0.8, 0], [40, 40, 8, 8, 0.7, 0]])]
    assert mean_average_precision(found, truth, 2) == pytest.approx((1 + 2 / 3) / 2)
    twice = [torch.cat([found[0][:1], found[0][:1]])]  # the same box twice is one hit and one miss
    assert mean_average_precision(twice, truth, 2) == pytest.approx(0.5)
    assert mean_average_precision([torch.zeros(0, 6)], truth, 2) == 0
    assert math.isnan(mean_average_precision(found, [torch.zeros(0, 5)], 2))


def test_the_detector_learns_boxes():
    torch.manual_seed(0)
    model, loss = YOLOv3(num_classes=2, width=0.05), YOLOLoss(64, 2, SMALL)
    images = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss(model(images), [BOXES, BOXES[:1]])
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.9 * values[0]
