"""The binary engine: bit for bit the float simulation, with Numba and without; published counts; small files."""

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers.quantization import BinaryConv2d, PackedBinaryConv2d, pack_binary
from convette.models import birealnet, create_model, load, save
from convette.quantization import binary_cost
from convette.runtime import prepare
from convette.runtime.binary_networks import XnorConv2d, kernels, numpy_kernel, packed_network


def used(name, **arguments):
    """A network whose statistics are those of some images."""
    model = create_model(name, seed=0, **arguments)
    with torch.no_grad():
        model.train()(torch.randn(4, arguments.get("in_channels", 3), 16, 16))
    return model.eval()


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_every_kernel_counts_what_the_float_convolution_adds(kernel, stride, value):
    for channels in (3, 64, 70):
        layer = BinaryConv2d(channels, 9, kernel, stride, kernel // 2, padding_value=value, threshold=0.2).eval()
        x = torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(channels))
        expected = layer(x)
        for chosen in (numpy_kernel, kernels()):
            packed = XnorConv2d(layer)
            packed.kernels = chosen
            assert torch.equal(packed(x), expected)
        assert torch.equal(XnorConv2d(pack_binary(nn.Sequential(layer))[0])(x), expected)


@pytest.mark.parametrize(
    ("name", "binary", "real"), [("binary_nin", 949_248, 20_170), ("binary_vgg11", 9_216_000, 12_362)]
)
def test_networks_have_the_published_sizes(name, binary, real):
    cost = binary_cost(create_model(name, seed=0).eval(), torch.randn(1, 3, 32, 32))
    assert (cost.binary_weights, cost.real_parameters) == (binary, real)
    assert cost.size == binary // 8 + 4 * real
    assert cost.effective_macs == cost.real_macs + cost.binary_macs / 64


@pytest.mark.parametrize(
    ("name", "binary", "real"), [("birealnet18", 10_985_472, 704_040), ("birealnet34", 21_086_208, 711_464)]
)
def test_bireal_networks_have_the_published_sizes(name, binary, real):
    model = create_model(name, num_classes=1000, seed=0)
    latent = sum(m.weight.numel() for m in model.modules() if isinstance(m, BinaryConv2d))
    assert latent == binary and sum(p.numel() for p in model.parameters()) - latent == real
    assert sum(p.numel() for p in create_model(f"{name}_real", num_classes=1000).parameters()) == binary + real


def test_another_depth_is_refused():
    with pytest.raises(UsageError, match="18 and 34"):
        birealnet(depth=50)


@pytest.mark.parametrize("name", ["binary_nin_025", "binary_vgg11_025", "birealnet18_025"])
def test_the_engine_gives_the_simulation_bit_for_bit(name):
    model = used(name)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(packed_network(model)(images), expected)
    with prepare("binary:cpu", model, images[:1]) as runner:
        assert runner.precision == "binary"
        assert (runner(images) == expected.numpy()).all()


def test_a_file_holds_one_bit_a_weight_and_loads(tmp_path):
    model = used("birealnet18_025", in_channels=1)
    packed = pack_binary(model)
    save(packed, tmp_path / "binary.safetensors")
    loaded = load(tmp_path / "binary.safetensors")
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    cost = binary_cost(packed, images[:1])
    assert cost == binary_cost(model, images[:1])
    layers = [m for m in loaded.modules() if isinstance(m, PackedBinaryConv2d)]
    assert len(layers) == 16 and sum(m.bits.numel() for m in layers) == cost.binary_weights // 8
    save(model, tmp_path / "latent.safetensors")
    latent, small = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("latent", "binary"))
    assert small < 0.2 * latent


def test_a_network_without_signs_and_a_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no binary convolution"):
        prepare("binary:cpu", create_model("resnet20", seed=0), torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match="runs modules"):
        prepare("binary:cpu", tmp_path / "x.onnx", torch.randn(1, 3, 8, 8))


def test_training_keeps_latent_weights_within_one_and_without_decay():
    from convette.data import load_data
    from convette.training import TrainSettings, train, with_own
    from convette.training.methods import LatentWeights

    data = load_data("digits")
    model = create_model("birealnet18_025", in_channels=1, stem="small", seed=0)
    methods = with_own(model, [], data)
    assert [type(method) for method in methods] == [LatentWeights]
    seen = []

    class Watch(LatentWeights):
        def apply(self, event, trainer):
            super().apply(event, trainer)
            latent = model.stages[0][0].conv.weight
            for group in trainer.state.optimizers["main"].param_groups:
                if any(parameter is latent for parameter in group["params"]):
                    seen.append(group["weight_decay"])

    before = model.stages[0][0].conv.weight.detach().clone()
    settings = TrainSettings(
        epochs=1, batch_size=512, optimizer="adamw", learning_rate=0.5, warmup_epochs=0, ema_decay=None, augmentation=()
    )
    train(model, data, settings, methods=[Watch()])
    latent = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, BinaryConv2d)])
    assert latent.abs().max() <= 1 and not torch.equal(before, model.stages[0][0].conv.weight)
    assert set(seen) == {0.0}


def test_weights_are_real_for_a_share_of_the_steps_and_norms_keep_their_sign():
    from convette.data import load_data
    from convette.training import TrainSettings, train
    from convette.training.events import Event
    from convette.training.methods import LatentWeights

    model = create_model("binary_nin_025", in_channels=1, seed=0)
    layers = [layer for layer in model.modules() if isinstance(layer, BinaryConv2d)]
    real, judged = [], []

    class Watch(LatentWeights):
        def apply(self, event, trainer):
            super().apply(event, trainer)
            if event is Event.BATCH_START:
                real.append(layers[0].real_weights)
                layer = layers[0].train()
                images = torch.ones(1, layer.in_channels, 4, 4)
                expected = layer.weight if layer.real_weights else layer.binary_weight()
                judged.append(
                    torch.allclose(layer(images)[0, :, 0, 0], expected.sum((1, 2, 3)) + layer.bias, atol=1e-4)
                )

    settings = TrainSettings(
        epochs=2, batch_size=512, optimizer="adamw", learning_rate=0.5, warmup_epochs=0, ema_decay=None, augmentation=()
    )
    train(model, load_data("digits"), settings, methods=[Watch(centre=True, least_gamma=0.01, real_share=0.5)])
    assert real == [True] * (len(real) // 2) + [False] * (len(real) // 2) and all(judged) and len(real) >= 2
    assert not any(layer.real_weights for layer in layers)
    scales = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.affine]
    assert min(scale.min().item() for scale in scales) == pytest.approx(0.01)
    with pytest.raises(UsageError, match="real_share = 1"):
        LatentWeights(real_share=1)
