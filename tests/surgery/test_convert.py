"""Converted layers: chosen, made, carried over, trained and written as they should be."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.nets import OptionAResNet, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError
from convette.layers.activation import ATAC
from convette.surgery import Replacement


class ScaledNorm2d(nn.BatchNorm2d):
    """A normaliser of the user's own, with a parameter more."""

    def __init__(self, num_features, eps=1e-5, power=1.0):
        super().__init__(num_features, eps)
        self.power = power
        self.extra = nn.Parameter(torch.randn(num_features))

    def forward(self, x):
        return super().forward(x) + 0 * self.extra.view(1, -1, 1, 1)


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


def resnet(seed=0):
    torch.manual_seed(seed)
    return randomise(OptionAResNet(blocks=2, width=4))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)


def test_norms_carry_weights_and_come_back_from_json():
    model = resnet()
    old = dict(model.named_parameters())
    with torch.no_grad():
        before = model(IMAGES)
    change = surgery.convert(model, {nn.BatchNorm2d: ScaledNorm2d}, IMAGES)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before), "weights, statistics and eps are the old layer's"
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert all(dict(model.named_parameters())[name] is p for name, p in old.items())
    assert set(change.added) == {name for name, _ in model.named_parameters()} - set(old)
    edits = [json.loads(json.dumps(edit.to_json())) for edit in change.edits]
    with pytest.raises(FileFormatError, match="trust"):
        surgery.edit_from_json(edits[0])
    with surgery.trusting(edits[0]["constructor"]):
        again = surgery.replay(resnet(), [surgery.edit_from_json(edit) for edit in edits])
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_optimiser_gets_new_parameters_in_the_right_group():
    model = resnet()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in norms)]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": norms, "weight_decay": 0.0}], lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    state = {id(p): optimizer.state[p]["momentum_buffer"].clone() for p in norms}
    average = copy.deepcopy(model)
    change = surgery.convert(model, {nn.BatchNorm2d: ScaledNorm2d}, optimizers=[optimizer])
    extra = [p for name, p in model.named_parameters() if name.endswith("extra")]
    second = optimizer.param_groups[1]["params"]
    assert len(second) == len(norms) + len(extra)
    assert all(any(p is q for q in second) for p in extra)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], state[id(p)]) for p in norms)
    optimizer.zero_grad()
    model(IMAGES).sum().backward()
    optimizer.step()
    change.migrate(average)
    a, b = dict(average.named_parameters()), dict(surgery.replay(resnet(), change.edits).named_parameters())
    assert all(torch.equal(a[name], b[name]) for name in a if name.endswith("extra")), "drawn from the seed alone"


def test_two_optimisers_share_the_model():
    model = resnet()
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    first = torch.optim.SGD([p for p in model.parameters() if id(p) in norms], lr=0.1)
    second = torch.optim.Adam([p for p in model.parameters() if id(p) not in norms], lr=0.1)
    graph = surgery.trace(model, IMAGES)
    edits = [
        graph.shrink({"layer1.0.conv1": torch.arange(2)}),
        surgery.Convert("layer1.0.bn1", f"{ScaledNorm2d.__module__}:ScaledNorm2d", {"num_features": 2}),
        surgery.Insert("layer1.0.bn1", 2),
    ]
    change = surgery.apply(model, *edits)
    for optimizer in (first, second):
        change.migrate_optimizer(optimizer)
    held = [id(p) for o in (first, second) for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert any(p is model.layer1[0].bn1[0].extra for p in first.param_groups[0]["params"])


def test_what_is_gone_leaves_and_a_later_shrink_follows():
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gone = model.bn1.weight
    surgery.convert(model, {nn.BatchNorm2d: nn.Identity}, include="bn1", optimizers=[optimizer])
    assert not any(p is gone for group in optimizer.param_groups for p in group["params"])
    graph = surgery.trace(model, IMAGES)
    surgery.apply(model, graph.shrink({graph.groups[1].name: torch.tensor([0, 1])}), example=IMAGES, prove=True)
    # One go: what the first edit brings in, the second changes.
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trial = surgery.replay(
        copy.deepcopy(model), surgery.convert_edits(model, {nn.BatchNorm2d: nn.GroupNorm}, include="layer1.0.bn1")
    )
    shrink = surgery.trace(trial, IMAGES)
    name = "layer1.0.conv1"
    edits = [*surgery.convert_edits(model, {nn.BatchNorm2d: ScaledNorm2d}, include="layer1.0.bn1")]
    converted = surgery.replay(copy.deepcopy(model), edits)
    edits.append(surgery.trace(converted, IMAGES).shrink({name: torch.tensor([0, 3])}))
    change = surgery.apply(model, *edits)
    change.migrate_optimizer(optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters())) and {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert name in {group.name for group in shrink.groups}


def test_arguments_from_the_old_layer_and_from_a_run():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.Conv2d(6, 4, 1)
            )

    model = Net()
    surgery.convert(
        model, {nn.BatchNorm2d: nn.GroupNorm, "Conv2d": Replacement(nn.Conv2d, {"padding_mode": "circular"})}, IMAGES
    )
    assert (model[1].num_groups, model[1].num_channels, model[1].eps) == (2, 6, 0.1)
    assert (model[0].stride, model[0].padding, model[0].bias, model[0].padding_mode) == (
        (2, 2),
        (1, 1),
        None,
        "circular",
    )
    with pytest.raises(StructureError, match="channels"):
        surgery.convert_edits(nn.Sequential(nn.Linear(3, 6), nn.ReLU()), {nn.ReLU: Gate})  # no image to guess
    surgery.convert(model, {nn.ReLU: Gate}, IMAGES)
    assert model[2].linear.in_features == 6
    surgery.convert(model, {Gate: nn.PReLU}, IMAGES)
    with pytest.raises(StructureError, match="Did you mean"):
        surgery.convert_edits(model, {nn.PReLU: Replacement(nn.Hardtanh, {"min_vall": 0})})
    with pytest.raises(StructureError, match="it has"):
        surgery.convert(model, {nn.LSTM: nn.GRU})


def test_places():
    model = resnet()

    def names(where, **more):
        return [
            edit.module
            for edit in surgery.convert_edits(model, {nn.BatchNorm2d: nn.InstanceNorm2d}, where=where, **more)
        ]

    assert names("stem") == ["bn1"]
    assert names("last in block") == [f"layer{i}.{j}.bn2" for i in (1, 2, 3) for j in (0, 1)]
    assert names("first in stage") == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1"]
    assert names("last in stage", exclude="layer2.*") == ["layer1.1.bn2", "layer3.1.bn2"]
    flat = nn.Sequential(*(layer for width in (4, 6) for layer in (nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width))))
    edits = surgery.convert_edits(flat, {nn.BatchNorm2d: nn.InstanceNorm2d}, where="first in stage")
    assert [edit.module for edit in edits] == ["1", "3"]  # the same stages as "stage:1" and "stage:2"
    assert names("all", include=["layer?.0.*", "bn1"], exclude="*.bn2") == [
        "bn1",
        "layer1.0.bn1",
        "layer2.0.bn1",
        "layer3.0.bn1",
    ]
    with pytest.raises(StructureError, match="stem"):
        names("stems")
    with pytest.raises(StructureError):
        names("head")


def test_places_in_library_networks():
    import torchvision

    model = torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25)
    last = surgery.convert_edits(model, {nn.BatchNorm2d: nn.Identity}, where="last in block")
    assert [edit.module for edit in last][:3] == ["features.1.conv.2", "features.2.conv.3", "features.3.conv.3"]
    assert [e.module for e in surgery.convert_edits(model, {"ReLU6": nn.ReLU}, where="stem")] == ["features.0.2"]
    assert [e.module for e in surgery.convert_edits(model, {"ReLU6": nn.ReLU}, where="head")] == ["features.18.2"]


def test_timm_norms_keep_their_activation_and_files_come_back(tmp_path):
    import timm

    def build(origin=None):
        torch.manual_seed(0)
        return timm.create_model("mobilenetv3_small_050", num_classes=5)

    model = randomise(surgery.set_origin(build(), surgery.Origin("test")))
    images = torch.randn(2, 3, 32, 32)
    kinds = [type(m).__name__ for m in model.modules()]
    surgery.convert(model, {nn.BatchNorm2d: "timm.layers:LayerNorm2d"}, images, where="last in block")
    surgery.convert(model, {nn.BatchNorm2d: nn.GroupNorm}, images)
    after = [type(m).__name__ for m in model.modules()]
    acts = ("Hardswish", "ReLU")
    assert [sum(kind == act for kind in kinds) for act in acts] == [sum(kind == act for kind in after) for act in acts]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    surgery.save_model(model, tmp_path / "m.safetensors")
    again = surgery.load_model(tmp_path / "m.safetensors", build)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def test_an_outcome_of_another_shape_is_taken_back():
    model = resnet()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(StructureError):
        surgery.convert(model, {nn.Linear: Replacement(nn.Linear, {"out_features": 3})}, IMAGES)
    with pytest.raises(StructureError, match="cannot be made"):
        surgery.convert(model, {nn.BatchNorm2d: Replacement(nn.GroupNorm, {"num_groups": 3})}, IMAGES)
    assert list(model.modules()) == modules and not surgery.structure_log(model).edits
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


GOOD = {
    "kind": "convert",
    "module": "bn1",
    "constructor": "torch.nn:GroupNorm",
    "arguments": {"num_groups": 2, "num_channels": 4},
}


@pytest.mark.parametrize(
    "change",
    [
        {"constructor": "os:system"},
        {"constructor": "torch.nn.functional.F:x"},
        {"constructor": "torch.nnx:Linear"},
        {"constructor": "subprocess:Popen"},
        {"constructor": "torch.nn:Linear()"},
        {"constructor": 3},
        {"module": ""},
        {"seed": "x"},
        {"arguments": {"num_groups": {"a": 1}}},
        {"arguments": {"num_groups": float("inf")}},
        {"arguments": {"device": "cuda"}},
        {"arguments": [1]},
        {"keep_activation": 1},
    ],
)
def test_tampered_edits_are_refused(change):
    value = {**GOOD, **change}
    with pytest.raises((FileFormatError, StructureError)) as caught:
        surgery.apply(resnet(), surgery.edit_from_json(value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("constructor", "arguments"),
    [
        ("torch.nn:Linear", {"in_features": 1 << 20, "out_features": 1 << 20}),
        ("torch.nn:Nothing", {}),
        ("torch.nn:functional", {}),
        ("torch.nn:Parameter", {}),
        ("torch.nn.modules.conv:Optional", {}),
        ("timm.layers:nothing", {}),
        ("torch.nn:GroupNorm", {"surprise": 1}),
    ],
)
def test_layers_that_cannot_be_made(constructor, arguments):
    model = resnet()
    with pytest.raises(StructureError):
        surgery.apply(model, surgery.edit_from_json({**GOOD, "constructor": constructor, "arguments": arguments}))
    assert type(model.bn1) is nn.BatchNorm2d


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(
        ["torch.nn:GroupNorm", "torch.nn:InstanceNorm2d", "torch.nn:BatchNorm2d", "torch.nn:Identity"]
    ),
    where=st.sampled_from(["all", "stem", "last in block", "first in stage"]),
    seed=st.integers(0, 99),
)
def test_any_conversion_replays_bit_for_bit(target, where, seed):
    model = resnet(seed)
    change = surgery.convert(
        model,
        {nn.BatchNorm2d: target, nn.Conv2d: Replacement(nn.Conv2d, {"bias": True})},
        IMAGES,
        where=where,
        seed=seed,
    )
    again = surgery.replay(
        resnet(seed), [surgery.edit_from_json(json.loads(json.dumps(e.to_json()))) for e in change.edits]
    )
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_class_the_network_does_not_have_is_noted_beside_one_it_has(capsys):
    surgery.convert(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), {nn.ReLU: nn.SiLU, nn.Tanh: nn.SiLU})
    assert "is a Tanh" in capsys.readouterr().err


def test_channels_are_found_without_an_example():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU())
    surgery.convert(net, {nn.ReLU: ATAC})
    assert (net[1].expand.out_channels, net[3].expand.out_channels) == (4, 6)
