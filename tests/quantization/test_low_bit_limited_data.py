"""Low-bit with limited data: two stages that help, exact allocation, packed files, exports that run."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette import surgery
from convette.cost import count
from convette.errors import BudgetError, ConvetteError, DataError, StructureError, UsageError
from convette.layers.quantization import PackedBinaryConv2d, PackedConv2d
from convette.layers.quantization.deployed import quantized_layers
from convette.layers.quantization.edits import calibrate
from convette.models import create_model, load, save
from convette.quantization import LowBitSettings, QuantizeSettings, low_bit
from convette.quantization._blocks import blocks_of, run_block
from convette.quantization._imitation import independent_stage, rounding_sides
from convette.quantization.low_bit_limited_data import allocate, choose_bits, layer_bytes, rounded, settings_from
from convette.runtime import export, prepare, read_export_metadata

QUICK = {"block_steps": 0, "joint_steps": 0}


@pytest.fixture(scope="module")
def few(digits):
    return digits.preprocessing(digits.train.stored[:48])


@pytest.fixture(scope="module")
def folded(net, few):
    model = copy.deepcopy(net).eval()
    surgery.apply(model, *surgery.fold_edits(model, few[:2]))
    return model


def accuracy(model, digits):
    with torch.no_grad():
        logits = model(digits.preprocessing(digits.validation.stored))
    return float((logits.argmax(1) == digits.validation.labels).float().mean())


def test_both_stages_bring_accuracy_back(net, few, digits):
    start = copy.deepcopy(net).eval()
    plain = low_bit(start, few, LowBitSettings(bits=2, activation_bits=4, scale_groups=1, **QUICK))
    helped = low_bit(
        start,
        few,
        LowBitSettings(bits=2, activation_bits=4, scale_groups=4, block_steps=100, joint_steps=100, learning_rate=1e-3),
    )
    assert all(after <= before for before, after in helped.block_errors.values())
    assert min(helped.joint_losses) <= helped.joint_losses[0]
    assert accuracy(helped.model, digits) > accuracy(plain.model, digits) + 0.02
    assert torch.equal(next(start.parameters()), next(net.parameters()))


def student_of(folded, few, **settings):
    settings = LowBitSettings(shift=0, **settings)
    bits = choose_bits(folded, few, settings)
    student = rounded(folded, bits, settings)
    calibrate(student, few)
    return student, blocks_of(folded, list(bits), few[:2]), settings


def test_a_block_that_is_not_rounded_has_nothing_to_learn_and_blocks_learn_alone(net, few, folded):
    """Stage 1 on the same block: error 0 and no change; the gradients of one block touch no other."""
    settings = LowBitSettings(shift=0, block_steps=3, learning_rate=1e-2)
    same = copy.deepcopy(folded)
    blocks = blocks_of(folded, ["conv", "conv3"], few[:2])
    errors = independent_stage(folded, same, blocks, few, few, settings, torch.Generator())
    assert all(pair == (0.0, 0.0) for pair in errors.values())
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), folded.parameters(), strict=True))
    student, blocks, settings = student_of(folded, few, bits=2, block_steps=3, learning_rate=1e-2)
    before = copy.deepcopy(student.state_dict())
    one = [block for block in blocks if block.layers == ("conv",)]
    independent_stage(folded, student, one, few, few, settings, torch.Generator())
    moved = {
        name.partition(".")[0] for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved <= {"conv"} and all(p.grad is None for p in student.parameters())


def test_blocks_learn_from_rounded_inputs_where_asked(net, few, folded):
    found = {}
    for inputs in ("float", "quantized"):
        torch.manual_seed(0)
        result = low_bit(net, few, LowBitSettings(bits=2, block_steps=4, joint_steps=0, shift=0, block_inputs=inputs))
        found[inputs] = result.block_errors
        assert all(after <= before for before, after in result.block_errors.values())
    first = next(iter(found["float"]))
    # Rounded inputs are further from the target to begin with; the first block has none before it.
    assert found["float"][first] == found["quantized"][first]
    assert any(found["quantized"][name][0] > found["float"][name][0] for name in found["float"])


def test_adaptive_rounding_chooses_between_the_two_grid_points(net, few, folded):
    student, blocks, settings = student_of(
        folded, few, bits=3, block_steps=30, learning_rate=3e-2, adaptive_rounding=True
    )
    starts = {name: (layer.integers(), layer.scales().clone()) for name, layer in quantized_layers(student).items()}
    sides = {id(layer): (low, high) for layer, low, high in rounding_sides(student)}
    independent_stage(folded, student, blocks, few, few, settings, torch.Generator().manual_seed(0))
    changed = 0
    for name, layer in quantized_layers(student).items():
        integers, scales = starts[name]
        low, high = sides[id(layer)]
        assert torch.equal(layer.scales(), scales)
        value = layer.quantized_weight()
        assert bool(((value >= low - 1e-6) & (value <= high + 1e-6)).all())
        assert int((layer.integers().int() - integers.int()).abs().max()) <= 1
        changed += int((layer.integers() != integers).sum())
    assert changed > 0


def test_integers_alone_give_the_same_answers(net, few, digits):
    """Sums of int32, one multiplier a channel: what an integer engine computes."""
    model = low_bit(net, few, LowBitSettings(bits=4, block_steps=0, joint_steps=0)).model
    images = digits.preprocessing(digits.validation.stored)
    for layer in quantized_layers(model).values():

        def integer(x, layer=layer):
            quantizer = layer.activation
            step, zero = float(quantizer.log_scale.exp()), int(quantizer.zero)
            q = ((x / step).round() + zero).clamp(0, 2**quantizer.bits - 1).int() - zero
            weight = layer.integers().double()
            if isinstance(layer, PackedConv2d):
                sums = F.conv2d(q.double(), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            else:
                sums = F.linear(q.double(), weight)
            assert sums.abs().max() < 2**31 and torch.equal(sums, sums.round())
            shape = (1, -1, *[1] * (sums.ndim - 2))
            outputs = sums * (layer.scales().double() * step).reshape(shape)
            return (outputs + (0 if layer.bias is None else layer.bias.double().reshape(shape))).float()

        layer.integer = integer
    with torch.no_grad():
        expected = model(images)
        for layer in quantized_layers(model).values():
            layer.forward = layer.integer
        found = model(images)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.995
    # One step of the last layer's input at most, where a sum of floats fell on the other side of a rounding.
    head = list(quantized_layers(model).values())[-1]
    step = float(head.activation.log_scale.exp() * head.scales().max() * 2 ** (head.bits - 1))
    assert (found - expected).abs().max() < 4 * step


def test_eight_bits_lose_nothing_and_the_size_is_the_bytes(net, few, digits):
    result = low_bit(net, few, LowBitSettings(bits=8, scale_groups=4, **QUICK))
    assert accuracy(result.model, digits) >= accuracy(copy.deepcopy(net).eval(), digits) - 0.01
    stored = sum(x.numel() * x.element_size() for x in result.model.state_dict().values())
    assert result.size == stored == count(result.model, few[:1]).size
    assert count(result.model, few[:1]).parameters >= 16 * 9 + 32 * 16 * 9 + 32 * 32 * 9
    assert result.float_size > 3 * result.size and result.to_json()["size"] == result.size


@pytest.mark.parametrize("share", [0.12, 0.2])
def test_mixed_precision_meets_the_size_exactly_predicted(net, few, folded, share):
    size = int(share * low_bit(net, few, LowBitSettings(**QUICK)).float_size)
    settings = LowBitSettings(size=size, **QUICK)
    result = low_bit(net, few, settings)
    assert result.size <= size
    layers = {name: folded.get_submodule(name) for name in result.bits}
    assert result.size == sum(layer_bytes(layer, result.bits[name], settings) for name, layer in layers.items())
    with pytest.raises(BudgetError, match="at the least"):
        choose_bits(folded, few, LowBitSettings(size=100))


@pytest.mark.parametrize("share", [0.13, 0.2])
def test_the_file_on_disk_meets_the_size(tmp_path, share):
    model = create_model("resnet8", in_channels=1, seed=0)
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.train()(images)
    size = int(share * 4 * sum(p.numel() for p in model.parameters()))
    result = low_bit(model.eval(), images, LowBitSettings(size=size, choices=(2, 3, 4, 5, 6, 8), **QUICK))
    save(result.model, tmp_path / "small.safetensors")
    written = (tmp_path / "small.safetensors").stat().st_size
    assert written == result.file_size == result.to_json()["file_size"] and 0.93 * size < written <= size
    assert written - result.size < 1500  # a header of a KB or so
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "small.safetensors")(images), result.model(images))


@pytest.mark.parametrize("observer", ["min_max", "percentile", "entropy"])
def test_every_observer_of_a_recipe_has_an_effect(net, few, observer):
    steps = {}
    for name in ("mse", observer):
        settings = settings_from(QuantizeSettings(method="low_bit", observer=name, block_steps=0, joint_steps=0))
        model = low_bit(net, few, settings).model
        steps[name] = torch.stack(
            [model.get_submodule(layer).activation.log_scale for layer in ("conv", "conv3", "head")]
        )
    assert not torch.equal(steps["mse"], steps[observer])


def test_binary_layers_are_packed_with_the_others(tmp_path):
    model = create_model("birealnet18_025", in_channels=1, stem="small", seed=0)
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        model.train()(images)
    size = 140_000
    result = low_bit(model.eval(), images, LowBitSettings(size=size, **QUICK))
    assert sum(isinstance(layer, PackedBinaryConv2d) for layer in result.model.modules()) == 16
    save(result.model, tmp_path / "binary.safetensors")
    assert (tmp_path / "binary.safetensors").stat().st_size <= size
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "binary.safetensors")(images), result.model(images))


def test_the_allocation_equals_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(5):
        errors = np.sort(generator.random((4, 3)) ** 4, axis=1)[:, ::-1]
        sizes = np.sort(generator.integers(5, 60, (4, 3)), axis=1)
        limit = int(generator.integers(sizes.min(1).sum(), sizes.max(1).sum()))
        best = min(
            sum(errors[row, pick] for row, pick in enumerate(picks))
            for picks in itertools.product(range(3), repeat=4)
            if sum(sizes[row, pick] for row, pick in enumerate(picks)) <= limit
        )
        found = allocate(errors, sizes, limit)
        assert sum(sizes[row, pick] for row, pick in enumerate(found)) <= limit
        assert sum(errors[row, pick] for row, pick in enumerate(found)) == pytest.approx(best)
    assert allocate(errors, sizes, 1) is None


def test_blocks_are_residual_ones_and_learn_alone():
    model = create_model("resnet20", seed=0).eval()
    x = torch.randn(4, 3, 8, 8)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    blocks = blocks_of(model, names, x)
    assert [block.name for block in blocks[:3]] == ["conv1", "layer1.0", "layer1.1"]
    assert blocks[-1].name == "linear" and len(blocks) == 11
    inputs, outputs = run_block(model, "layer2.0", x)
    with torch.no_grad():
        assert torch.equal(model.layer2[0](inputs), outputs)


def test_a_packed_network_is_saved_small_loaded_and_exported(tmp_path):
    model = create_model("resnet20", in_channels=1, seed=0)
    images = torch.randn(24, 1, 8, 8)
    with torch.no_grad():
        model.train()(images)
    result = low_bit(model.eval(), images, LowBitSettings(bits=4, **QUICK))
    save(result.model, tmp_path / "packed.safetensors")
    loaded = load(tmp_path / "packed.safetensors")
    with torch.no_grad():
        expected = result.model(images)
        assert torch.equal(loaded(images), expected)
    assert isinstance(loaded.layer1[0].conv1, PackedConv2d) and loaded.layer1[0].conv1.packed.dtype == torch.uint8
    assert (tmp_path / "packed.safetensors").stat().st_size < 0.14 * result.float_size
    onnx = export(loaded, images[:1], tmp_path / "packed.onnx")
    assert onnx.stat().st_size < 0.35 * result.float_size  # int4 weights
    assert read_export_metadata(onnx)["precision"] == "int8"
    export(loaded, images[:1], tmp_path / "packed.xml")
    for engine, name in (("onnxruntime:cpu", "packed.onnx"), ("openvino:cpu", "packed.xml")):
        with prepare(engine, tmp_path / name, images[:1]) as runner:
            assert runner.precision == "int8"
            error = F.mse_loss(torch.from_numpy(runner(images)), expected) / expected.square().mean()
            assert error < 0.05


def test_a_layer_that_sees_only_zeros_keeps_its_range_and_says_so(net, few, capsys):
    dead = copy.deepcopy(net).eval()
    with torch.no_grad():
        for norm in (dead.norm2, dead.norm3):
            norm.weight.zero_()
            norm.bias.fill_(-1)
    result = low_bit(dead, few, LowBitSettings(block_steps=2, joint_steps=2))
    assert "layer conv3: its input is zero" in capsys.readouterr().err
    with torch.no_grad():
        found, expected = result.model(few), dead(few)
    assert found.isfinite().all() and torch.allclose(found, expected, atol=0.05)


def test_weights_that_are_not_finite_are_refused(net, few):
    broken = copy.deepcopy(net).eval()
    with torch.no_grad():
        broken.conv.weight[0, 0, 0, 0] = float("nan")
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(ConvetteError, match=r"conv\.weight of Net .*not finite"):
        low_bit(broken, few, LowBitSettings(**QUICK))
    assert all(
        torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)) for name, value in broken.state_dict().items()
    )


def test_images_and_settings_that_cannot_be(net, few):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError, match="1 image"):
        low_bit(net, few[:1])
    with pytest.raises(DataError, match="all the same"):
        low_bit(net, few[:1].expand(20, -1, -1, -1))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(StructureError, match="no convolution or linear"):
        low_bit(nn.Sequential(nn.ReLU()), few)
    for wrong in ({"bits": 9}, {"activation_bits": 1}, {"held_out": 1.0}, {"choices": (1, 2)}, {"block_inputs": "x"}):
        with pytest.raises(UsageError, match="low-bit"):
            LowBitSettings(**wrong)
