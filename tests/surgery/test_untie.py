"""Un-tied residual streams: the same function, then branches and readers that lose channels on their own."""

import copy
import json

import pytest
import torch
from tests.surgery.nets import half, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError
from convette.models import create_model, load, save
from convette.surgery import Gather, Scatter, Site, Untie

NETWORKS = {"resnet20": 32, "timm:resnet18": 32, "mobilenet_v2": 32, "timm:resnetv2_18": 32, "timm:test_vit": 160}


def made(name, double=True):
    model = randomise(create_model(name, num_classes=5, seed=3))
    images = torch.randn(2, 3, NETWORKS[name], NETWORKS[name], generator=torch.Generator().manual_seed(0))
    return (model.double(), images.double()) if double else (model, images)


def outputs(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_changes_then_every_branch_and_reader_goes_its_own_way(name):
    model, images = made(name)
    before, tied = outputs(model, images), surgery.trace(model, images)
    edit = surgery.untie(tied)
    assert torch.equal(outputs(model, images), before), "finding the edit leaves a trace"
    assert surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    surgery.apply(model, edit, example=images, prove=True)
    assert torch.equal(outputs(model, images), before)
    graph = surgery.trace(model, images)
    assert not graph.frozen and len(graph) > len(tied) and graph.units > tied.units
    for group in graph:
        branches = {m.module for m in group.of("producer") if m.parameter.endswith("conv2.weight")}
        assert len(branches) <= 1, "two branches of a stream are still tied"
    size = sum(p.numel() for p in model.parameters())
    surgery.apply(model, graph.shrink(half(graph)), example=images, prove=True, tolerance=1e-10)
    assert sum(p.numel() for p in model.parameters()) < 0.5 * size
    again = surgery.trace(model, images)
    surgery.apply(model, again.shrink(half(again, 1)), example=images, prove=True, tolerance=1e-10)
    assert outputs(model, images).shape == before.shape


def test_dropped_rows_and_columns_are_zeros_in_the_network_it_was():
    model, images = made("resnet20")
    plain = copy.deepcopy(model)
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    graph = surgery.trace(model, images)
    kept = {"layer2.1.conv2": torch.tensor([0, 3, 30]), "layer2.2.conv1.gather": torch.tensor([1, 3, 5, 31])}
    surgery.apply(model, graph.shrink(kept))
    assert model.layer2[1].conv2.out_channels == 3 and model.layer2[2].conv1.layer.in_channels == 4
    assert model.layer2[1].bn2.scatter.index.tolist() == [0, 3, 30]
    with torch.no_grad():
        gone = [c for c in range(32) if c not in (0, 3, 30)]
        plain.layer2[1].bn2.weight[gone] = 0
        plain.layer2[1].bn2.bias[gone] = 0
        plain.layer2[2].conv1.weight[:, [c for c in range(32) if c not in (1, 3, 5, 31)]] = 0
    assert (outputs(model, images) - outputs(plain, images)).abs().max() < 1e-10


def test_only_the_stream_that_was_named():
    model, images = made("timm:resnet18")
    graph = surgery.trace(model, images)
    name = next(group.name for group in graph if any("layer3.1.conv2" in m.parameter for m in group.members))
    edit = surgery.untie(graph, name)
    assert [site.module for site in edit.writes] == ["layer3.0.bn2", "layer3.0.downsample.1", "layer3.1.bn2"]
    assert [site.module for site in edit.reads] == ["layer3.1.conv1", "layer4.0.conv1", "layer4.0.downsample.0"]
    with pytest.raises(StructureError, match=r"'layer1\.0\.conv1' is no residual stream"):
        surgery.untie(graph, "layer1.0.conv1")
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(StructureError, match="Sequential has no residual stream"):
        surgery.untie(surgery.trace(plain, images.float()))


def test_undo_is_bitwise_and_optimiser_and_average_are_carried_along():
    model, images = made("resnet20")
    modules = list(model.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = surgery.untie(surgery.trace(model, images))
    change = edit.apply(model)
    change.revert()
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()(images).sum().backward()
    optimizer.step()
    model.eval()
    done = surgery.apply(model, edit)
    done.migrate_optimizer(optimizer)
    done.migrate(average)
    graph = surgery.trace(model, images)
    cut = surgery.apply(model, graph.shrink(half(graph)))
    cut.migrate_optimizer(optimizer)
    cut.migrate(average)
    trained = {id(item) for group in optimizer.param_groups for item in group["params"]}
    assert trained == {id(item) for item in model.parameters()}
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape == parameter.grad.shape
    assert {n: t.shape for n, t in average.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    optimizer.step()


def test_files_come_back_and_whole_indices_fold_away(tmp_path):
    model, images = made("timm:resnet18", double=False)
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    assert not [m for m in surgery.fold(model, images).modules() if isinstance(m, Gather | Scatter)]
    graph = surgery.trace(model, images)
    kept = half(graph)
    whole = [name for name in kept if name.startswith("layer1") and name.endswith(".gather")]
    surgery.apply(model, graph.shrink({name: units for name, units in kept.items() if name not in whole}))
    save(model, tmp_path / "untied.safetensors")
    again = load(tmp_path / "untied.safetensors")
    assert torch.equal(outputs(again, images), outputs(model, images))
    folded = surgery.fold(again, images)
    left = [name for name, m in folded.named_modules() if isinstance(m, Gather)]
    assert left and not set(left) & set(whole)
    assert torch.allclose(outputs(folded, images), outputs(model, images), rtol=1e-4, atol=1e-4)
    save(folded, tmp_path / "folded.safetensors")
    assert torch.equal(outputs(load(tmp_path / "folded.safetensors"), images), outputs(folded, images))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_exported_it_is_the_same(name, tmp_path):
    from convette.runtime import export, verify

    model, images = made(name, double=False)
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    graph = surgery.trace(model, images)
    surgery.apply(model, graph.shrink(half(graph)))
    path = export(model, images[:1], tmp_path / "net.onnx")
    check = verify(path, model, images, tolerance=1e-3)
    assert check.passed and check.engine.startswith("onnxruntime"), check


def test_pruning_criteria_score_what_only_reads():
    from convette.pruning import PruneSettings, prune

    model, images = made("resnet20", double=False)
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    result = prune(model, images[:1], "macs<=50%", PruneSettings(criterion="l1", epochs=0, steps=2))
    assert result.end.macs <= 0.5 * result.start.macs
    widths = {m.weight.shape[1] for n, m in result.model.named_modules() if n.endswith("conv1.layer")}
    assert len(widths) > 3, "readers of one stream read the same channels"
    graph = surgery.trace(model, images)
    assert "layer1.0.conv1.gather: 16 channels, picked from a stream" in surgery.units_text(graph)
    assert "layer1.0.conv1.gather" in surgery.units_svg(graph)
    assert "placed by layer1.0.bn2.scatter.index" in graph.explain("layer1.0.conv2", 3)


def test_what_was_cut_from_a_stream_grows_again():
    model, images = made("resnet20")
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    graph = surgery.trace(model, images)
    kept = {"layer2.1.conv2": torch.tensor([0, 3, 30]), "layer2.2.conv1.gather": torch.tensor([1, 3, 5, 31])}
    surgery.apply(model, graph.shrink(kept))
    before, state = outputs(model, images), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, mode, places in (
        ("layer2.1.conv2", "zero_in", [0, 3, 30, 1, 2]),
        ("layer2.2.conv1.gather", "zero_out", [1, 3, 5, 31, 0, 2]),
    ):
        graph = surgery.trace(model, images)
        with pytest.raises(StructureError, match=f"un-tied stream: its channels grow by mode '{mode}'"):
            surgery.grow(graph, {name: 2}, "split")
        with pytest.raises(StructureError, match=r"un-tied stream of 32 channels, of which (28|29) are free"):
            surgery.grow(graph, {name: 30}, mode)
        edit = surgery.grow(graph, {name: 2}, mode)
        assert surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
        fresh = copy.deepcopy(model)
        change = surgery.apply(model, edit, example=images, prove=True)
        change.migrate(fresh)
        index = next(tensor for key, tensor in model.named_buffers() if key in edit_indices(edit))
        assert index.tolist() == places
        assert torch.allclose(outputs(model, images), before, rtol=0, atol=1e-12)
        assert torch.equal(outputs(fresh, images), outputs(model, images))
        trained = copy.deepcopy(model).train()
        trained(images).square().sum().backward()
        # The new channels learn: through the norm that is zero, or through the weights that read them.
        if mode == "zero_in":
            assert bool(trained.layer2[1].bn2.layer.weight.grad[-2:].all())
        else:
            assert bool(trained.layer2[2].conv1.layer.weight.grad[:, -2:].any())
        surgery.apply(model, *surgery.ungrow(surgery.trace(model, images), edit))
        after = model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in state.items())


def edit_indices(edit):
    return {name for (name, _), item in edit.widened.items() if item.role == "index"}


def test_places_of_a_stream_that_cannot_be_are_refused():
    model, images = made("resnet20")
    surgery.apply(model, surgery.untie(surgery.trace(model, images)))
    graph = surgery.trace(model, images)
    surgery.apply(model, graph.shrink({"layer2.1.conv2": torch.tensor([0, 3, 30])}))
    edit = surgery.grow(surgery.trace(model, images), {"layer2.1.conv2": 1}, "zero_in")
    written = json.dumps(edit.to_json())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for place in (0, 32):
        wrong = json.loads(written)
        for entry in wrong["entries"]:
            entry["source"] = [place] if entry["role"] == "index" else entry["source"]
        with pytest.raises(StructureError, match="names already or the stream does not have"):
            surgery.apply(model, surgery.edit_from_json(wrong))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "untie", "reads": []},
        {"kind": "untie", "reads": [["a", 3, 1]], "writes": "b"},
        {"kind": "untie", "reads": [["a", 0, 1]], "writes": []},
        {"kind": "untie", "reads": [["a", 1 << 40, 1]], "writes": []},
        {"kind": "untie", "reads": [["", 3, 1]], "writes": []},
        {"kind": "untie", "reads": [["a", 3, True]], "writes": []},
        {"kind": "untie", "reads": [["a", 3]], "writes": []},
    ],
)
def test_tampered_edits_are_refused(value):
    with pytest.raises(FileFormatError, match="untie"):
        surgery.edit_from_json(value)


def test_a_module_that_is_not_there_leaves_the_model_alone():
    model, _ = made("resnet20")
    modules = list(model.modules())
    with pytest.raises(StructureError, match="no module 'layer9'"):
        surgery.apply(model, Untie((Site("layer1.0.conv1", 16),), (Site("layer9", 16),)))
    assert list(model.modules()) == modules
