"""create_model, files of weights, origins: what works, and that what does not says what would."""

import pickle
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convette import models
from convette.errors import FileFormatError, UsageError
from convette.models import _adapt, _libraries, _weights, create_model, load_weights


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", [n for n in models.MODELS if "_9m" not in n and n not in ("ssdlite_mobilenet_v2",)])
def test_every_name_builds(name):
    with torch.device("meta"):
        assert isinstance(create_model(name, num_classes=3, in_channels=2), nn.Module)


def test_seed_decides_the_weights_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, second = create_model("resnet20", seed=1), create_model("resnet20", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert _equal(first, second)
    assert not _equal(first, create_model("resnet20", seed=2))


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "torchvision:resnet18", "timm:mobilenetv3_small_050", "torchvision:squeezenet1_1"]
)
def test_library_networks_adapt(name):
    model = create_model(name, num_classes=7, in_channels=1, stem="small", seed=0).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_small_stem_keeps_the_resolution(name):
    small, default = (create_model(name, stem=stem, seed=0).eval() for stem in ("small", "default"))
    sides = []
    for model in (small, default):
        handle = model.layer1.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        handle.remove()
    assert sides == [64, 16]
    assert small.state_dict().keys() == default.state_dict().keys()
    assert isinstance(small.maxpool, nn.Identity) and small.conv1.stride == (1, 1)
    assert small.training is False


@pytest.mark.parametrize(
    ("name", "convolution", "pool"),
    [
        ("timm:resnet18d", "conv1.0", "maxpool"),  # a stem of three convolutions
        ("torchvision:densenet121", "features.conv0", "features.pool0"),
        ("torchvision:shufflenet_v2_x0_5", "conv1.0", "maxpool"),
        ("torchvision:mobilenet_v3_small", "features.0.0", None),
        ("timm:regnetx_002", "stem.conv", None),
        ("torchvision:vgg11_bn", None, None),
        ("timm:vit_tiny_patch16_224", "patch_embed.proj", None),
    ],
)
def test_stem_is_found_from_a_run(name, convolution, pool):
    model = create_model(name, seed=0)
    assert _adapt.stem_of(model, torch.zeros(1, 3, 224, 224)) == (convolution, pool)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_network_tied_to_its_patches_has_no_small_stem():
    with pytest.raises(UsageError, match=r"vit_tiny.*stem 'default'"):
        create_model("timm:vit_tiny_patch16_224", stem="small")


def test_network_without_convolution_has_no_small_stem():
    with pytest.raises(UsageError, match="starts with a convolution"):
        _adapt.use_small_stem(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.zeros(1, 3, 4, 4), "mlp")


def test_network_at_full_resolution_is_left_as_it_is(capsys):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, stride=2))
    _adapt.use_small_stem(model, torch.zeros(1, 3, 32, 32), "plain")
    assert "full resolution already" in capsys.readouterr().err
    assert isinstance(model[1], nn.MaxPool2d)


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_kept_weights_answer_equal_channels_as_before(in_channels):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=True))
    grey = torch.randn(2, 1, 8, 8)
    before = model(grey.expand(-1, 3, -1, -1))
    _adapt.use_in_channels(model, torch.zeros(1, 3, 8, 8), in_channels, keep=True)
    assert model[0].in_channels == in_channels
    if in_channels in (1, 6):  # every old channel used equally often
        torch.testing.assert_close(model(grey.expand(-1, in_channels, -1, -1)), before)


def test_auxiliary_heads_are_left_out():
    model = create_model("torchvision:googlenet", num_classes=4, seed=0)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet_20", "'resnet20'"),
        ("mobilenetv2", "torchvision:mobilenet_v2|'mobilenet_v2'"),
        ("resnet18", "'timm:resnet18' or 'torchvision:resnet18'"),
        ("timm:resnet81", "'resnet18'"),
        ("torchvision:resnet81", "'resnet18'"),
        ("convette:resnet200", "'resnet20'"),
        ("tim:resnet18", "'timm'"),
        ("qqqq", "timm:NAME"),
        ("timm:hf-hub:someone/model", "unknown model"),
        ("timm:hf_hub:someone", "unknown model"),
        ("timm:local-dir:.", "unknown model"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(name, hint):
    with pytest.raises(UsageError, match=hint) as raised:
        create_model(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"in_channels": -1}, {"stem": "tiny"}, {"pretrained": True}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises((UsageError, TypeError)) as raised:  # TypeError: beartype sees the stem first
        create_model("resnet20", **arguments)
    assert str(raised.value)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        textwrap.dedent(
            """
            from torch import nn
            def net(num_classes, in_channels=3):
                return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.LazyLinear(num_classes))
            def fixed():
                return nn.Linear(2, 2)
            def broken():
                raise RuntimeError("no such luck\\nsecond line")
            def number():
                return 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("user_module")
def test_the_users_own_callable():
    before = list(sys.path)
    model = create_model("my_nets:net", num_classes=6, in_channels=2)
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 6)
    assert isinstance(create_model("my_nets:fixed"), nn.Linear)
    assert sys.path == before


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("my_nets:nett", "'net'"),
        ("my_nets:broken", "RuntimeError: no such luck"),
        ("my_nets:number", "int"),
        ("my_netts:net", "cannot be imported"),
    ],
)
def test_bad_callables_say_what_is_wrong(name, hint):
    with pytest.raises(UsageError, match=hint) as raised:
        create_model(name)
    assert "\n" not in str(raised.value)


class _Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_pickles_are_refused_without_being_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Evil()))
    torch.save({"model": _Evil()}, tmp_path / "evil.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    for name in ("evil.pkl", "evil.pt", "whole.pth"):
        with pytest.raises(UsageError, match="refused"):
            create_model(name)
        with pytest.raises(UsageError, match="refused"):
            create_model("resnet20", weights=name)
    assert not (tmp_path / "pwned").exists()


def test_plain_weights_given_as_a_model_are_explained(tmp_path):
    model = create_model("resnet20", seed=0)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(UsageError, match="name the architecture"):
            create_model(str(tmp_path / name))
    with pytest.raises(UsageError, match="no such file"):
        create_model(str(tmp_path / "missing.safetensors"))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="safetensors"):
        create_model(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_load_strictly_from_pt(tmp_path, wrap, prefix):
    source, target = create_model("resnet20", seed=0), create_model("resnet20", seed=1)
    torch.save(wrap({prefix + name: t for name, t in source.state_dict().items()}), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert _equal(source, target)


def test_weights_load_from_safetensors(tmp_path):
    source = create_model("mobilenet_v2_035", seed=0)
    save_file({f"module.{name}": t for name, t in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert _equal(source, create_model("mobilenet_v2_035", seed=1, weights=tmp_path / "w.safetensors"))


def test_weights_of_before_batches_were_counted_load(tmp_path):
    source, target = create_model("resnet20", seed=0), create_model("resnet20", seed=1)
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert _equal(source, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.weight"), "'bn1.weight' is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "'extra' is not part of the model"),
        (
            lambda s: s.update({"linear.weight": torch.zeros(3, 64)}),
            r"'linear.weight' has shape \(3, 64\), the model has \(10, 64\)",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path, change, message):
    model = create_model("resnet20", seed=0)
    state = {name: t.clone() for name, t in create_model("resnet20", seed=1).state_dict().items()}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(FileFormatError, match=message) as raised:
        load_weights(model, tmp_path / "w.safetensors")
    assert "\n" not in str(raised.value) and "w.safetensors" in str(raised.value)
    assert _equal(model, create_model("resnet20", seed=0))


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0notjson!"])
def test_damaged_safetensors_are_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"w\.safetensors"):
        load_weights(create_model("resnet20"), tmp_path / "w.safetensors")


def test_pt_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match="no tensors"):
        load_weights(create_model("resnet20"), tmp_path / "w.pt")


def test_published_cifar_weights_are_known_by_their_first_tensor(tmp_path, monkeypatch):
    model = create_model("resnet20", seed=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert models.known_preprocessing(model) is None
    monkeypatch.setattr(_weights, "_PUBLISHED_CIFAR", {_weights.fingerprint(model.conv1.weight)})
    load_weights(model, tmp_path / "w.safetensors")
    assert models.known_preprocessing(model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_pretrained_timm_and_torchvision_tell_their_normalisation(monkeypatch):
    """Without the net: the fetch is replaced by an untrained network."""
    import timm
    import torchvision

    make_timm, make_torchvision = timm.create_model, torchvision.models.get_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: make_timm(name, **k))
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **k: make_torchvision(name, **k))
    for name in ("timm:resnet18", "torchvision:resnet18"):
        assert models.known_preprocessing(create_model(name)) is None
        mean, std = models.known_preprocessing(create_model(name, pretrained=True))
        assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
        mean, _ = models.known_preprocessing(create_model(name, pretrained=True, in_channels=1))
        assert mean == pytest.approx((0.449,))


def test_copy_matching_leaves_a_head_of_another_size():
    source, target = create_model("resnet20", num_classes=5, seed=0), create_model("resnet20", seed=1)
    left = _libraries.copy_matching(source.state_dict(), target)
    assert left == ["linear.weight", "linear.bias"]
    assert torch.equal(source.conv1.weight, target.conv1.weight)


def test_weights_that_cannot_be_fetched_say_so(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"cannot be fetched \(no route\)"):
        create_model("timm:resnet18", pretrained=True)
