"""Sparse 1x1 convolutions: the format is lossless, the kernels equal the dense product, masks and schedule are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import count
from convette.errors import UsageError
from convette.models import create_model
from convette.runtime import fast_sparse_convnets as sparse
from convette.runtime import prepare
from convette.runtime.fast_sparse_convnets import (
    DepthwiseConv,
    SparseConv1x1,
    choose_block,
    eligibility,
    multiply_packed,
    pack_sparse_1x1,
    sparse_network,
    unpack,
)
from convette.training.methods.fast_sparse_convnets import SparseTraining, cubic_sparsity, magnitude_mask


def weights(filters, channels, density, block=1, seed=0):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(filters, channels)).astype(np.float32)
    kept = generator.random((-(-filters // block), channels)) < density
    return matrix * np.repeat(kept, block, 0)[:filters]


@given(st.integers(1, 13), st.integers(1, 20), st.floats(0, 1), st.sampled_from([1, 2, 4]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_unpacking_undoes_packing_and_the_kernel_is_the_dense_product(filters, channels, density, block, seed):
    matrix = weights(filters, channels, density, block, seed)
    matrix[0] = 0  # a filter without a weight
    bias = np.linspace(-1, 1, filters, dtype=np.float32)
    packed = pack_sparse_1x1(matrix, bias, block)
    again, offsets = unpack(packed)
    assert (again == matrix).all() and (offsets == bias).all()
    assert len(packed.deltas) == packed.counts.sum() and packed.bytes > 0
    for positions in (1, 7, 128, 200):
        x = np.random.default_rng(seed).normal(size=(channels, positions)).astype(np.float32)
        expected = matrix @ x + bias[:, None]
        assert np.allclose(multiply_packed(packed, x), expected, rtol=1e-5, atol=1e-5)
        clamped = multiply_packed(packed, x, 0.0, 0.5)
        assert np.allclose(clamped, np.clip(expected, 0, 0.5), rtol=1e-5, atol=1e-5)


def test_negative_zero_is_a_zero_and_no_numba_is_no_trouble(monkeypatch):
    matrix = np.array([[-0.0, 2.0], [0.0, 0.0]], np.float32)
    assert pack_sparse_1x1(matrix).nonzeros == 1
    x = np.ones((2, 3), np.float32)
    expected = multiply_packed(pack_sparse_1x1(matrix), x)
    monkeypatch.setattr(sparse, "_kernels", lambda: (sparse._scipy_product, None))
    assert (multiply_packed(pack_sparse_1x1(matrix), x) == expected).all()
    assert (multiply_packed(pack_sparse_1x1(matrix), x, 0.0, 1.0) == expected.clip(0, 1)).all()
    # What SciPy was given is dropped with the weights, and stays while they are there.
    held = len(sparse._matrices)
    packed = pack_sparse_1x1(matrix)
    multiply_packed(packed, x)
    multiply_packed(packed, x)
    assert len(sparse._matrices) == held + 1
    del packed
    assert len(sparse._matrices) == held


def test_mobilenet_v1_has_the_published_counts():
    """95 % of its MACs are in 1x1 convolutions; with a tenth of their weights 83 million are left."""
    model = create_model("timm:mobilenetv1_100", num_classes=1000, seed=0).eval()
    found = count(model, torch.zeros(1, 3, 224, 224))
    assert found.parameters == 4_231_976 and round(found.macs / 1e6, 1) == 568.7
    pointwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    weights = sum(model.get_submodule(name).weight.numel() for name in pointwise)
    macs = sum(layer.macs for layer in found.layers if layer.name in pointwise)
    assert weights == 3_139_584 and round(macs / 1e6, 1) == 539.5
    assert round((found.macs - 0.9 * macs) / 1e6) == 83
    kept = sum(int(magnitude_mask(model.get_submodule(name).weight, 0.9).sum()) for name in pointwise)
    assert kept == pytest.approx(0.314e6, abs=1e3)
    assert (found.parameters - weights + kept) / 1e6 == pytest.approx(1.41, abs=0.005)


def test_blocks_are_used_where_they_are_filled_to_nine_tenths():
    four = np.zeros((4, 10), np.float32)
    four[:, :9] = 1
    four[:, 9] = [0, 0, 0, 1]  # 37 of 10 blocks: 3.7
    assert choose_block(four) == 4
    four[3, 8] = 0
    assert choose_block(four) == 4  # 36 of 10: exactly 3.6
    four[3, 7] = 0
    assert choose_block(four) != 4  # 35 of 10
    two = np.zeros((2, 10), np.float32)
    two[:, :8] = 1
    two[0, 8:] = 1
    assert choose_block(two) == 2  # 18 of 10: exactly 1.8
    two[1, 7] = 0
    assert choose_block(two) == 1
    assert choose_block(np.zeros((8, 4), np.float32)) == 1


def test_more_than_two_thirds_of_zeros_and_not_just_two_thirds_run_sparse():
    layer = nn.Conv2d(9, 2, 1)
    with torch.no_grad():
        layer.weight.fill_(1).view(-1)[:12] = 0
    assert eligibility(nn.Sequential(layer))[0].runs == "dense"
    with torch.no_grad():
        layer.weight.view(-1)[12] = 0
    assert eligibility(nn.Sequential(layer))[0].runs == "sparse"
    others = nn.Sequential(
        nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3)
    )
    for conv in others:
        nn.init.zeros_(conv.weight)
    assert {row.runs for row in eligibility(others)} == {"dense"}


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_depthwise_kernel_is_the_convolution(kernel, stride):
    if sparse._kernels()[1] is None:
        pytest.skip("without Numba PyTorch does it")
    layer = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6).eval().requires_grad_(False)
    own = DepthwiseConv(layer)
    own.low, own.high = 0.0, 6.0
    for height, width in ((7, 9), (8, 8), (1, 3), (2, 1)):
        x = 4 * torch.randn(2, 6, height, width)
        assert torch.allclose(own(x), layer(x).clamp(0, 6), atol=1e-5)


@given(st.floats(0.05, 0.95), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_masks_are_exact_keep_the_largest_and_whole_blocks(sparsity, block):
    weight = torch.randn(10, 12, 1, 1, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, sparsity, block)
    wanted = round(sparsity * 120)
    assert wanted - block < int((~mask).sum()) <= wanted
    if block == 1:
        assert weight.abs()[mask].min() >= weight.abs()[~mask].max()
    whole = mask.flatten(1)[: 10 // block * block].reshape(-1, block, 12)
    assert (whole.all(1) | ~whole.any(1)).all()


def test_the_schedule_is_cubic():
    assert cubic_sparsity(0.1, 0.9, 0.1, 0.7) == 0
    assert cubic_sparsity(0.7, 0.9, 0.1, 0.7) == cubic_sparsity(1.0, 0.9, 0.1, 0.7) == 0.9
    assert cubic_sparsity(0.4, 0.8, 0.1, 0.7) == pytest.approx(0.875 * 0.8)
    values = [cubic_sparsity(t / 50, 0.9, 0.1, 0.7) for t in range(51)]
    assert values == sorted(values)
    for wrong in ({"sparsity": 1.0}, {"block": 3}, {"start": 0.5, "end": 0.4}, {"every": 0}):
        with pytest.raises(UsageError, match="fast_sparse_convnets"):
            SparseTraining(**wrong)


def sparse_mobilenet(sparsity=0.9, block=1):
    model = create_model("mobilenet_v2_035", in_channels=1, seed=0)
    with torch.no_grad():
        model.train()(torch.randn(4, 1, 32, 32))
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                layer.weight.mul_(magnitude_mask(layer.weight, sparsity, block))
    return model.eval()


@pytest.mark.parametrize("block", [1, 4])
def test_a_network_runs_sparse_with_its_relus_fused(block):
    model = sparse_mobilenet(block=block)
    images = torch.randn(3, 1, 32, 32)
    network = sparse_network(model, images)
    kernels = [m for m in network.modules() if isinstance(m, SparseConv1x1)]
    assert len(kernels) > 25 and {m.packed.block for m in kernels} <= {1, 2, 4} and any(m.high == 6 for m in kernels)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    with torch.no_grad():
        expected = model(images)
    with prepare("sparse:cpu", model, images[:1]) as runner:
        assert np.allclose(runner(images), expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(UsageError, match="fast-sparse-convnets"):
        prepare("sparse:cpu", create_model("mobilenet_v2_035", seed=0), torch.randn(1, 3, 32, 32))


def test_training_ends_with_exactly_the_zeros_asked_for():
    from convette.data import load_data
    from convette.training import TrainSettings, find_method, train

    data = load_data("digits")
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Conv2d(32, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )  # fmt: skip
    assert find_method("fast-sparse-convnets") is SparseTraining
    settings = TrainSettings(epochs=1, batch_size=128, ema_decay=0.9, augmentation=(), precision="fp32")
    train(model, data, settings, methods=[SparseTraining(0.75, every=2)])
    assert int((model[3].weight == 0).sum()) == round(0.75 * 512)
    assert int((model[6].weight == 0).sum()) == 0  # fewer than 256 weights
    assert [row.runs for row in eligibility(model)] == ["dense", "sparse", "dense"]


def test_a_wrong_shape_is_refused():
    with pytest.raises(UsageError, match="no 1x1"):
        pack_sparse_1x1(np.zeros((2, 2, 3, 3)))
    with pytest.raises(UsageError, match="block = 3"):
        pack_sparse_1x1(np.zeros((2, 2)), block=3)
    with pytest.raises(UsageError, match="4 channels"):
        multiply_packed(pack_sparse_1x1(np.zeros((2, 4))), np.zeros((3, 5), np.float32))
