"""Known networks: shrunk equals masked, saved equals loaded, folded equals unfolded."""

import copy

import pytest
import torch
from tests.surgery.nets import OptionAResNet, half, randomise

from convette import surgery

ZOO = {
    "option-a": (OptionAResNet, 32),
    "torchvision:resnet18": (None, 40),
    "torchvision:mobilenet_v2": (None, 40),
    "torchvision:mobilenet_v3_small": (None, 40),
    "torchvision:efficientnet_b0": (None, 40),
    "torchvision:regnet_y_400mf": (None, 40),
    "torchvision:squeezenet1_1": (None, 40),
    "torchvision:shufflenet_v2_x0_5": (None, 40),
    "timm:densenet121": (None, 40),
    "timm:ghostnet_100": (None, 40),
    "timm:resnext26ts": (None, 40),
    "timm:mobilenetv3_small_050": (None, 40),
    "timm:skresnet18": (None, 40),
    "timm:dla46x_c": (None, 64),
}


def make(name):
    maker, size = ZOO[name]
    if maker is not None:
        return randomise(maker()), torch.randn(2, 3, size, size)
    home, leaf = name.split(":")
    if home == "timm":
        import timm

        model = timm.create_model(leaf, num_classes=7)
    else:
        import torchvision

        model = torchvision.models.get_model(leaf, num_classes=7)
    return randomise(model), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", ZOO)
def test_shrunk_equals_masked_then_file_then_fold(name, tmp_path):
    torch.manual_seed(0)
    model, images = make(name)
    graph = surgery.trace(model, images)
    assert not graph.frozen
    selection = half(graph)
    with torch.no_grad():
        before = model(images)
        with surgery.masked(model, graph, selection) as same:
            expected = same(images)
        assert torch.equal(model(images), before), "masking leaves a trace"
        fresh = copy.deepcopy(model)
        edit = graph.shrink(selection)
        assert torch.equal(model(images), before), "computing an edit leaves a trace"
        surgery.apply(model, edit)
        got = model(images)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (got - before).abs().max() > 1e-4 * before.abs().max(), "the test would not notice a wrong answer"

    surgery.set_origin(fresh, surgery.Origin("test", {"name": name}))
    surgery.apply(fresh, surgery.edit_from_json(edit.to_json()))
    path = tmp_path / "model.safetensors"
    surgery.save_model(fresh, path)
    again = surgery.load_model(path, lambda origin: make(origin.arguments["name"])[0])
    with torch.no_grad():
        assert torch.equal(again(images), got)

    folded = surgery.fold(model, images)
    with torch.no_grad():
        assert (folded(images) - got).abs().max() <= 1e-5 * scale
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(images).sum().backward()
