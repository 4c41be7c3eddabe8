"""Saved models come back bit for bit; what a file may name, and what it may not."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from convette import models
from convette.errors import FileFormatError, UsageError
from convette.models import build_from_origin, create_model, load, load_weights, save
from convette.surgery import Origin, apply, fold, structure_log, trace


def _trained_like(model, channels=3, side=32):
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, channels, side, side))
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "simplenet_cifar_310k",
        "simplenet_5m_m2_050",
        "mobilenet_v2_035",
        "timm:resnet18",
        "timm:mobilenetv3_small_050",
        "torchvision:squeezenet1_1",
    ],
)
def test_saved_models_come_back_bit_for_bit(tmp_path, name):
    model = _trained_like(create_model(name, num_classes=6, in_channels=1, stem="small", seed=0), channels=1)
    save(model, tmp_path / "m.safetensors")
    state = torch.random.get_rng_state()
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.training and type(loaded) is type(model)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert structure_log(loaded).origin == structure_log(model).origin
    again = create_model(str(tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_new_process_gives_the_same_outputs(tmp_path):
    model = _trained_like(create_model("mobilenet_v2_050", stem="small", seed=0))
    save(model, tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 32, 32)
    save_file({"x": images}, tmp_path / "x.safetensors")
    code = """
        import sys, torch
        from safetensors.torch import load_file, save_file
        from convette import models
        torch.set_num_threads(1)
        with torch.no_grad():
            save_file({"y": models.load(sys.argv[1])(load_file(sys.argv[2])["x"])}, sys.argv[3])
    """
    paths = [str(tmp_path / name) for name in ("m.safetensors", "x.safetensors", "y.safetensors")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), *paths], check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = model(images)
    torch.set_num_threads(threads)
    assert torch.equal(load_file(paths[2])["y"], expected)


@pytest.mark.parametrize("name", ["resnet20", "simplenet_cifar_310k", "mobilenet_v2_035", "timm:resnet18"])
def test_pruned_and_folded_models_come_back(tmp_path, name):
    model = _trained_like(create_model(name, stem="small", seed=0))
    images = torch.randn(2, 3, 32, 32)
    graph = trace(model, images)
    selection = {
        group.name: torch.arange(max(1, group.size // 2)) for group in graph.groups if group.constraints.parts == 1
    }
    apply(model, graph.shrink(selection))
    model = fold(model, images)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    fresh = create_model(name, stem="small", seed=0)
    assert sum(p.numel() for p in loaded.parameters()) < 0.6 * sum(p.numel() for p in fresh.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.mobilenet_v2(7, width=0.6, stem="small", dropout=0.1),
        lambda: models.simplenet_5m(7, mode="m3", scale=0.25),
        lambda: models.ssdlite_mobilenet_v2(4, width=0.35),
        lambda: models.deeplabv3_mobilenet_v2(4, width=0.35, output_stride=8),
    ],
)
def test_constructors_called_directly_can_be_saved_too(tmp_path, make):
    model = make()
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_counts_of_a_file_are_held(tmp_path):
    path = tmp_path / "m.safetensors"
    save(create_model("resnet20", num_classes=6, in_channels=1), path)
    assert create_model(str(path), num_classes=6, in_channels=1).linear.out_features == 6
    for arguments, message in (
        ({"num_classes": 10}, "num_classes 6, the task needs 10"),
        ({"in_channels": 3}, "in_channels 1, the task needs 3"),
        ({"stem": "small"}, "keeps its weights and its stem"),
    ):
        with pytest.raises(UsageError, match=message):
            create_model(str(path), **arguments)
    with pytest.raises(FileFormatError, match="holds a whole model"):
        load_weights(create_model("resnet20"), path)


@pytest.mark.parametrize(
    ("constructor", "arguments", "message"),
    [
        ("os:system", {"command": "true"}, "only name networks of convette, timm and torchvision"),
        ("builtins:eval", {}, "only name networks"),
        ("resnet20", {}, "only name networks"),
        ("convette:resnet_20", {}, "Did you mean 'resnet20'"),
        ("convette:__import__", {}, "unknown"),
        ("convette:CifarResNet", {}, "unknown"),
        ("timm:hf_hub:someone/model", {}, "unknown model"),
        ("timm:local-dir:somewhere", {}, "unknown model"),
        ("timm:../../x", {}, "unknown model"),
        ("torchvision:quantized_resnet18", {}, "unknown model"),
        ("convette:resnet20", {"num_clases": 3}, "Did you mean 'num_classes'"),
        ("convette:resnet20", {"num_classes": "3"}, "expected a whole number"),
        ("convette:resnet20", {"num_classes": True}, "expected a whole number"),
        ("convette:resnet20", {"num_classes": 0}, "expected a whole number"),
        ("convette:resnet20", {"num_classes": 10**12}, "expected a whole number"),
        ("convette:mobilenet_v2", {"width": float("nan")}, "expected a number"),
        ("convette:mobilenet_v2", {"width": 1e9}, "expected a number"),
        ("convette:mobilenet_v2", {"width": 0}, "must be above 0"),
        ("convette:mobilenet_v2", {"stem": "huge"}, "one of default, small"),
        ("convette:simplenet_5m", {"mode": ["m1"]}, "one of m1, m2"),
        ("timm:resnet18", {"pretrained": True}, "no argument 'pretrained'"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "no argument 'checkpoint_path'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "no argument 'weights'"),
        ("timm:vit_tiny_patch16_224", {"stem": "small"}, "stem 'default'"),
    ],
)
def test_origins_that_a_file_may_not_have(constructor, arguments, message):
    with pytest.raises(FileFormatError, match=message) as raised:
        build_from_origin(Origin(constructor, arguments))
    assert "\n" not in str(raised.value)


def _tamper(path, change):
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["convette"])
    tensors = load_file(path)
    change(content, tensors)
    save_file(tensors, path, metadata={"convette": json.dumps(content)})


@pytest.mark.parametrize(
    "change",
    [
        lambda c, t: c["origin"].update(constructor="os:system"),
        lambda c, t: c["origin"]["arguments"].update(num_classes=11),
        lambda c, t: c["origin"].pop("constructor"),
        lambda c, t: c.update(edits=[{"kind": "shrink", "oops": 1}]),
        lambda c, t: t.pop("bn1.weight"),
        lambda c, t: t.update({"conv1.weight": torch.zeros(1)}),
    ],
)
def test_tampered_files_are_refused(tmp_path, change):
    path = tmp_path / "m.safetensors"
    save(create_model("resnet20"), path)
    _tamper(path, change)
    with pytest.raises(FileFormatError) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save(create_model("resnet20"), path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], (1 << 60).to_bytes(8, "little") + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"m\.safetensors"):
            load(path)


def test_a_function_of_the_users_own_is_typed_not_read(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = create_model("own_nets:net", num_classes=3)
    save(model, "m.safetensors")
    sys.modules.pop("own_nets")
    with pytest.raises(FileFormatError, match="type it yourself"):
        load("m.safetensors")
    assert "own_nets" not in sys.modules  # it was not even imported
    loaded = load("m.safetensors", constructor="own_nets:net")
    sys.modules.pop("own_nets")
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_models_without_an_origin_cannot_be_saved(tmp_path):
    with pytest.raises(UsageError, match="create_model"):
        save(nn.Linear(2, 2), tmp_path / "m.safetensors")


def test_normalisation_of_a_saved_card_wins(tmp_path):
    from convette.surgery import ModelCard, set_card

    model = create_model("resnet20")
    set_card(model, ModelCard(preprocessing={"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}))
    save(model, tmp_path / "m.safetensors")
    assert models.known_preprocessing(load(tmp_path / "m.safetensors")) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
