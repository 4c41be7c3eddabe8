import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import ConvetteError, UsageError
from convette.runtime import _verify, export, missing, verify
from convette.runtime._verify import compare


@pytest.fixture(scope="module")
def many_images():
    return torch.randn(260, 3, 12, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_exported_file_passes(exported, tiny, many_images, suffix):
    found = verify(exported[suffix], tiny, many_images)
    assert found.passed and found.images == 260 and found.precision == "fp32"
    assert found.agreement == 1.0 and found.max_relative_error < 1e-5
    assert found.engine == {".onnx": "onnxruntime:cpu:fp32", ".xml": "openvino:cpu:fp32"}[suffix]
    assert tiny.training, "verifying must leave the network's mode alone"


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_file_of_another_network_fails(exported, tiny, another_tiny, many_images, suffix):
    assert not verify(exported[suffix], another_tiny, many_images).passed
    nudged = copy.deepcopy(tiny)
    with torch.no_grad():
        nudged.head.bias[0] += 0.01
    assert not verify(exported[suffix], nudged, many_images).passed
    assert verify(exported[suffix], nudged, many_images, tolerance=0.1).passed


@pytest.mark.skipif(missing("openvino:cpu:bf16") is not None, reason="no bfloat16 on this processor")
def test_lower_precision_passes_by_agreement(exported, tiny, another_tiny, many_images):
    found = verify(exported[".xml"], tiny, many_images, engine="openvino:cpu:bf16")
    assert found.passed and found.precision == "bf16"
    assert found.max_relative_error < 0.03
    wrong = verify(exported[".xml"], another_tiny, many_images, engine="openvino:cpu:bf16")
    assert not wrong.passed and wrong.decided_agreement < 0.98


def test_what_cannot_be_compared_is_refused(exported, tiny, many_images, tmp_path):
    with pytest.raises(UsageError, match="no images"):
        verify(exported[".onnx"], tiny, many_images[:0])
    path = export(nn.Sequential(nn.Flatten(), nn.Linear(360, 7)), many_images[:1], tmp_path / "seven.onnx")
    with pytest.raises(ConvetteError, match=r"\(260, 7\), the network \(260, 5\)"):
        verify(path, tiny, many_images)
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(ConvetteError, match="network Tiny gives values that are not finite, first for image 0"):
        verify(exported[".onnx"], broken, many_images)


def test_values_that_are_not_finite_are_told(exported, tiny, many_images, monkeypatch):
    real = _verify.prepare

    def overflowing(*arguments, **options):
        runner = real(*arguments, **options)
        call = runner._call
        runner._call = lambda batch: np.where(batch[:, :1, 0, 0] > 0, np.inf, call(batch)).astype(np.float32)
        return runner

    monkeypatch.setattr(_verify, "prepare", overflowing)
    first = int((many_images[:, 0, 0, 0] > 0).int().argmax())
    with pytest.raises(ConvetteError, match=rf"tiny\.onnx on .* not finite, first for image {first}\."):
        verify(exported[".onnx"], tiny, many_images)


logits = st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2**31)))


@given(logits, st.floats(0, 0.01))
@settings(deadline=None)
def test_rounding_alone_never_fails_and_never_hides(shape, noise):
    n, seed = shape
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=(n, 4)).astype(np.float32)
    scale = np.abs(expected).max()
    actual = expected + generator.uniform(-1, 1, expected.shape) * noise * scale
    found = compare(expected, actual, tolerance=0.021, minimum_agreement=0.98, precision="bf16")
    # A pick can only change between classes that are at most twice the noise apart.
    assert found.passed and found.decided_agreement == 1.0
    assert found.agreement <= found.decided_agreement
    assert found.max_relative_error <= noise * 1.001 + 1e-6
    swapped = compare(expected, -expected, tolerance=0.0, minimum_agreement=0.98, precision="int8")
    assert not swapped.passed
