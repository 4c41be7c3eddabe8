"""Groups, constraints, all-or-nothing application, optimiser and averaged copies, folds."""

import copy

import pytest
import torch
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError
from convette.surgery import Fold, Origin, Shrink

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return randomise(OptionAResNet())


def test_groups_of_resnet20(model):
    graph = surgery.trace(model, IMAGES)
    sizes = sorted(group.size for group in graph)
    # Three residual streams: 16 channels run through all stages, 16 more join in stage 2, 32 more in stage 3.
    assert sizes == sorted([16, 16, 32] + [16] * 3 + [32] * 3 + [64] * 3)
    stream = graph["conv1"]
    wide = {(m.parameter, m.dim): m.index for m in stream.members}
    assert wide["layer2.0.conv2.weight", 0].view(-1).tolist() == list(range(8, 24))
    assert wide["layer3.0.conv2.weight", 0].view(-1).tolist() == list(range(24, 40))
    assert all(member.index.shape == (group.size, 1) for group in graph for member in group.members)
    assert {member.role for member in stream.members} == {"producer", "consumer", "affine"}
    assert "linear" not in {group.name for group in graph}
    assert len({group.name for group in graph}) == len(graph)


def test_trace_leaves_the_model_alone(model):
    model.train()
    model.layer1.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    graph = surgery.trace(model, IMAGES)
    graph.shrink(half(graph))
    assert modes == [module.training for module in model.modules()]
    for name, module in model.named_modules():
        assert set(vars(module)) == set(attributes[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert surgery.structure_log(model).edits == []


def test_check_names_what_is_wrong(model):
    graph = surgery.trace(model, IMAGES)
    keep = torch.arange(3)
    for selection, text in (
        ({"conv2": keep}, "Did you mean"),
        ({"conv1": keep[:0]}, "at least one"),
        ({"conv1": torch.tensor([0, 16])}, "units 0 to 15"),
        ({"conv1": torch.tensor([1, 0])}, "sorted"),
        ({"conv1": torch.tensor([1, 1])}, "once"),
        ({"conv1": torch.tensor([1.0])}, "int64"),
    ):
        with pytest.raises(StructureError, match=text):
            graph.shrink(selection)


def test_example_that_does_not_run(model):
    with pytest.raises(StructureError, match="does not run on the example"):
        surgery.trace(model, torch.randn(1, 4, 8, 8))


def test_apply_is_all_or_nothing(model):
    graph = surgery.trace(model, IMAGES)
    good = graph.shrink(half(graph))
    state = dict(model.named_parameters())
    bad = Shrink({("layer1.0.conv1.weight", 0): (0, 999)})
    with torch.no_grad():
        before = model(IMAGES)
    for edits in ((good, bad), (good, Shrink({}, {"conv1": {"nothing": 3}})), (Fold("conv1", "nowhere"),)):
        with pytest.raises(StructureError):
            surgery.apply(model, *edits)
        assert dict(model.named_parameters()) == state or all(
            state[name] is tensor for name, tensor in model.named_parameters()
        )
        with torch.no_grad():
            assert torch.equal(model(IMAGES), before)
        assert model.conv1.out_channels == 16 and surgery.structure_log(model).edits == []


def test_proof_catches_a_wrong_edit(model):
    graph = surgery.trace(model, IMAGES)
    edit = graph.shrink({"layer1.0.conv1": torch.arange(8)})
    kept = dict(edit.kept)
    kept["layer1.0.conv2.weight", 1] = tuple(range(8, 16))
    with pytest.raises(StructureError, match="not exact"):
        surgery.apply(model, Shrink(kept, edit.attributes), example=IMAGES, prove=True)
    assert model.layer1[0].conv1.out_channels == 16


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p)])
def test_optimiser_gradient_and_average_are_carried(model, make):
    optimizer = make(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    model(IMAGES).sum().backward()
    optimizer.step()
    average = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    graph = surgery.trace(model, IMAGES)
    change = surgery.apply(model, graph.shrink(half(graph)))
    change.migrate_optimizer(optimizer)
    change.migrate(average)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        sum(p.ndim > 1 for p in held),
        sum(p.ndim == 1 for p in held),
    ]
    for name, parameter in model.named_parameters():
        kept = change.parameters[name].kept if name in change.parameters else {}
        expected = gradient[name]
        for dim, index in kept.items():
            expected = expected.index_select(dim, index)
        assert torch.equal(parameter.grad, expected)
        for key, value in optimizer.state[parameter].items():
            old = state[name][key]
            for dim, index in kept.items() if value.ndim else ():
                old = old.index_select(dim, index)
            assert torch.equal(value, old), (name, key)
    with torch.no_grad():
        assert torch.equal(average.eval()(IMAGES), model.eval()(IMAGES))
    model(IMAGES).sum().backward()
    optimizer.step()


def test_shrinking_keeps_frozen_parameters_buffers_and_memory_format(model):
    model = model.to(memory_format=torch.channels_last)
    model.conv1.weight.requires_grad_(False)
    graph = surgery.trace(model, IMAGES)
    surgery.apply(model, graph.shrink(half(graph)))
    assert not model.conv1.weight.requires_grad and model.layer1[0].conv1.weight.requires_grad
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(model.bn1.weight, nn.Parameter) and model.bn1.running_var.shape == model.bn1.weight.shape
    assert model.bn1.num_features == len(model.bn1.weight) == model.conv1.out_channels


def test_log_and_card_survive_deepcopy(model):
    surgery.set_origin(model, Origin("test", {}))
    graph = surgery.trace(model, IMAGES)
    surgery.apply(model, graph.shrink(half(graph)))
    surgery.set_card(model, surgery.ModelCard(class_names=("x",)))
    again = copy.deepcopy(model)
    assert surgery.structure_log(again) == surgery.structure_log(model)
    assert surgery.structure_log(again) is not surgery.structure_log(model)
    assert surgery.card_of(again).class_names == ("x",)


def test_masked_restores_bit_for_bit_and_lets_training_through(model):
    graph = surgery.trace(model, IMAGES)
    selection = half(graph)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), surgery.masked(model, graph, selection):
        raise KeyError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_explain(model):
    graph = surgery.trace(model, IMAGES)
    text = graph.explain("layer2.0.conv1", 3)
    assert "layer2.0.conv1.weight dim 0: 3" in text and "layer2.0.conv2.weight dim 1: 3" in text
    assert "tied by __add__ in layer2.0" in graph.explain("layer2.0.conv2", 9).replace("add in", "__add__ in")
    assert "fixed" in graph.explain("linear", 0)
    with pytest.raises(StructureError, match="Did you mean"):
        graph.explain("layer2.0.conv3", 0)


class Folds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=2)
        self.bn4, self.conv4 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.conv5, self.bn5 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc, self.bn6 = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = torch.relu(self.bn2(self.up(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.conv3(self.bn3(x)))
        x = self.conv4(self.bn4(x))
        y = self.conv5(x)
        x = self.bn5(y) + y  # read twice: must not be folded
        return self.bn6(self.fc(x.mean((2, 3))))


def test_folds_are_found_from_the_graph_and_exact():
    torch.manual_seed(0)
    model = randomise(Folds()).double()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    edits = surgery.fold_edits(model, images)
    assert {(edit.layer, edit.norm, edit.before) for edit in edits} == {
        ("conv1", "bn1", False),
        ("up", "bn2", False),
        ("conv3", "bn3", True),
        ("fc", "bn6", False),
    }
    folded = surgery.fold(model, images)
    with torch.no_grad():
        assert (folded(images) - model(images)).abs().max() < 1e-12
    assert model.conv1.bias is None and folded.conv1.bias is not None
    surgery.apply(model, *edits, example=images, prove=True, tolerance=1e-12)
    assert [surgery.edit_from_json(edit.to_json()) for edit in edits] == list(edits)


def test_fold_leaves_the_optimiser_consistent():
    model = randomise(Folds())
    images = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(images).sum().backward()
    optimizer.step()
    surgery.apply(model, *surgery.fold_edits(model, images)).migrate_optimizer(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in model.parameters()}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())


def test_units_are_shown_in_words_and_as_a_picture(model):
    import xml.etree.ElementTree

    graph = surgery.trace(model, IMAGES)
    text = surgery.units_text(graph)
    assert text.startswith("12 groups, 400 units") and len(text.splitlines()) == 13
    assert "conv1: 16 channels, tied over conv1 + conv2 of 3 blocks of layer1" in text
    assert "layer1.0.conv1: 16 channels, made by layer1.0.conv1; read by layer1.0.conv2" in text
    picture = xml.etree.ElementTree.fromstring(surgery.units_svg(graph))
    assert len(picture.findall(".//{*}g")) == 12
    assert sorted(int(n.text) for n in picture.findall(".//{*}g/{*}text")) == sorted(group.size for group in graph)
