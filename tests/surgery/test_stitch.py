"""Stitched networks: cut where they may be, fitted, lean, and built again from what a file says."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import OptionAResNet, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(origin):
    if origin.constructor == "convette:stitch":
        return surgery.build_stitched(origin.arguments, build)
    torch.manual_seed(origin.arguments.get("seed", 0))
    return randomise(OptionAResNet(blocks=origin.arguments.get("blocks", 2), width=origin.arguments.get("width", 4)))


def resnet(**arguments):
    origin = surgery.Origin("test", arguments)
    return surgery.set_origin(build(origin), origin)


def output(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def near(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_network_stitched_to_itself_is_itself():
    model = resnet()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for at in ("layer1", "layer2.0", "layer2.1", "layer3"):
        made = surgery.stitch(model, at, model, at, IMAGES)
        assert near(output(made), output(model), 1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model._modules["layer2"]._forward_hooks


def test_two_widths_fit_least_squares_and_nothing_is_carried_for_nothing():
    one, other = resnet(width=8), resnet(width=4, blocks=3, seed=5)
    made = surgery.stitch(one, "layer1", other, "layer1", IMAGES)
    names = [name for name, _ in made.named_parameters()]
    assert not any(name.startswith(("front.layer2", "front.layer3", "front.linear")) for name in names)
    assert not any(name.startswith(("back.conv1", "back.bn1", "back.layer1")) for name in names)
    # The residual is orthogonal to what was given: no other layer does better.
    grabbed = {}
    one.layer1.register_forward_hook(lambda m, i, o: grabbed.update(a=o))
    other.layer1.register_forward_hook(lambda m, i, o: grabbed.update(b=o))
    output(one), output(other)
    a, b = (grabbed[key].movedim(1, -1).flatten(0, -2) for key in "ab")
    with torch.no_grad():
        residual = made.stitch[0](grabbed["a"]).movedim(1, -1).flatten(0, -2) - b
    assert (a.T @ residual / len(a)).abs().max() < 1e-4 and residual.mean(0).abs().max() < 1e-4


def test_sizes_that_differ_by_a_factor():
    model = resnet()
    for front_at, back_at, pool, upsample in (("layer1", "layer2", 2, 1), ("layer3", "layer2", 1, 2)):
        made = surgery.stitch(model, front_at, model, back_at, IMAGES)
        kinds = [type(layer) for layer in made.stitch]
        assert (nn.AvgPool2d in kinds) == (pool > 1) and (nn.Upsample in kinds) == (upsample > 1)
        assert output(made).shape == output(model).shape


def test_trained_cut_saved_and_nested(tmp_path):
    front, back = resnet(width=4), resnet(width=4, seed=3)
    graph = surgery.trace(back, IMAGES[:2])
    surgery.apply(back, graph.shrink({"layer3.0.conv1": torch.arange(5)}))
    made = surgery.stitch(front, "layer1", back, "layer2", IMAGES)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    made.train()(IMAGES).square().mean().backward()
    optimizer.step()
    graph = surgery.trace(made, IMAGES[:2])
    selection = {group.name: torch.arange(group.size - 1) for group in graph.groups}
    surgery.apply(made, graph.shrink(selection), example=IMAGES[:2], prove=True)
    twin = copy.deepcopy(made)
    assert torch.equal(output(twin), output(made))
    surgery.save_model(made, tmp_path / "a.safetensors")
    again = surgery.load_model(tmp_path / "a.safetensors", build)
    assert torch.equal(output(again), output(made))
    nested = surgery.stitch(again, "back.layer3.0", resnet(blocks=1), "layer3.0", IMAGES)
    surgery.save_model(nested, tmp_path / "b.safetensors")
    assert torch.equal(output(surgery.load_model(tmp_path / "b.safetensors", build)), output(nested))


def test_a_front_that_cannot_run_on_is_left_at_its_cut():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(4, 7)

        def forward(self, x):
            return self.b(self.a(x).mean((2, 3))).view(-1, 7)

    for front, stop in ((Viewing(), True), (resnet(), False)):
        made = surgery.stitch(front, "a" if stop else "layer1", resnet(), "layer1", IMAGES)
        assert made.catcher.stop == stop
        twin = copy.deepcopy(made)
        assert torch.equal(output(twin), output(made)) and made.catcher.value is None


def test_tokens():
    class Tokens(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Conv2d(3, width, 4, 4)
            self.first = nn.Linear(width, width)
            self.head = nn.Linear(width, 3)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2) if x.ndim == 4 else x
            return self.head(F.relu(self.first(x)).mean(1))

    one, other = Tokens(6), Tokens(10)
    made = surgery.stitch(one, "first", other, "first", IMAGES)
    assert isinstance(made.stitch, nn.Linear) and output(made).shape == (24, 3)


def test_cuts_that_cannot_be():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(x + self.b(self.a(x)))

    model = resnet()
    with pytest.raises(StructureError, match="cannot be cut"):
        surgery.stitch(model, "conv1", Around(), "a", IMAGES)
    with pytest.raises(StructureError, match="no module"):
        surgery.stitch(model, "nothing", model, "layer1", IMAGES)
    with pytest.raises(StructureError, match="no layer joins"):
        surgery.stitch(model, "linear", model, "layer1", IMAGES)
    shared = nn.Sequential(nn.Conv2d(3, 4, 1), act := nn.ReLU(), nn.Conv2d(4, 4, 1), act)
    with pytest.raises(StructureError, match="2 times"):
        surgery.stitch(shared, "1", model, "layer1", IMAGES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("front"),
        lambda v: v["front"].update(at=""),
        lambda v: v["front"].update(at="layer9"),
        lambda v: v["back"].update(skipped=["layer3"], at="layer3.0"),
        lambda v: v["back"].update(skipped="conv1"),
        lambda v: v["back"].update(skipped=["conv77"]),
        lambda v: v["back"].update(edits=[{"kind": "explode"}]),
        lambda v: v["back"].update(origin=None),
        lambda v: v.update(in_channels=1 << 40),
        lambda v: v.update(in_channels=1 << 19, out_channels=1 << 19),
        lambda v: v.update(pool=0),
        lambda v: v.update(layer="lambda"),
        lambda v: v.update(stop=1),
    ],
)
def test_tampered_recipes_are_refused(damage):
    made = surgery.stitch(resnet(), "layer1", resnet(), "layer1", IMAGES)
    origin = surgery.structure_log(made).origin
    value = json.loads(json.dumps(origin.arguments))
    assert surgery.Stitch.from_json(value).to_json() == value
    damage(value)
    with pytest.raises(FileFormatError) as caught:
        surgery.build_stitched(value, build)
    assert "\n" not in str(caught.value)


def test_nesting_has_an_end():
    made = surgery.stitch(resnet(), "layer1", resnet(), "layer1", IMAGES)
    value = surgery.structure_log(made).origin.arguments
    for _ in range(30):
        value = {**value, "front": {**value["front"], "origin": {"constructor": "convette:stitch", "arguments": value}}}
    with pytest.raises(FileFormatError, match="deep"):
        surgery.build_stitched(value, build)


def test_files_of_stitched_library_networks_are_read_by_name(tmp_path):
    from convette import models

    one = models.create_model("resnet20", num_classes=4, seed=0)
    other = models.create_model("timm:resnet10t", num_classes=4, seed=0, stem="small")
    made = surgery.stitch(one, "layer2", other, "layer2", IMAGES)
    models.save(made, tmp_path / "m.safetensors")
    assert torch.equal(output(models.load(tmp_path / "m.safetensors")), output(made))
