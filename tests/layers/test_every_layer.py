"""What holds for every layer beside the normalisers: odd input, state, folds, export, compilation, surgery."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays, fold_layers, folded_form
from convette.layers.activation import ATAC, LateralInhibition2d, RingInhibitedConv2d
from convette.layers.attention import LightNonLocal2d, SoAG
from convette.layers.convolution import QuadraticConv2d
from convette.layers.regularization import MaxDropout

C = 6
LAYERS = {
    "inhibition": lambda: LateralInhibition2d(C),
    "inhibition_linear": lambda: LateralInhibition2d(C, 2, "linear", contrast=True),
    "inhibition_none": lambda: LateralInhibition2d(C, init=0.0),
    "ring": lambda: RingInhibitedConv2d(C, C, 3, padding=1),
    "maxdropout": lambda: MaxDropout(),
    "maxdropout_channel": lambda: MaxDropout(0.5, "channel"),
    "atac": lambda: ATAC(C),
    "atac_global": lambda: ATAC(C, use_global=True),
    "soag": lambda: SoAG(C, 8),
    "soag_pure": lambda: SoAG(C, 8, "pure", center=True),
    "nonlocal": lambda: LightNonLocal2d(C, 0.5, zero_init=False),
    "nonlocal_strided": lambda: LightNonLocal2d(C, 0.5, 2, order="moments", zero_init=False),
    "quadratic": lambda: QuadraticConv2d(C, C, 3, padding=1),
    "quadratic_low_rank": lambda: QuadraticConv2d(C, C, 3, padding=1, rank=2),
}
# Norms inside: one value a channel is refused in training.
BATCH = ("atac", "atac_global", "soag", "nonlocal", "nonlocal_strided")
FOLD = {"inhibition_linear": nn.Conv2d, "inhibition_none": nn.Identity}
FOLD |= {"maxdropout": nn.Identity, "maxdropout_channel": nn.Identity}
# Computed in a precision of its own, whatever autocast says; the others are as exact as convolutions are.
ROUGH = ("quadratic", "quadratic_low_rank", "ring", "soag", "nonlocal", "nonlocal_strided")


def example(count=8):
    return torch.randn(count, C, 5, 4, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def learned(name):
    """A layer after two training batches, its parameters moved a little."""
    torch.manual_seed(5)
    layer = LAYERS[name]().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            if name != "inhibition_none":
                parameter.add_(0.05 * torch.rand_like(parameter))
    for _ in range(2):
        layer(example())
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_state_copies_and_batches(name):
    layer, x = learned(name).eval(), example()
    fresh = LAYERS[name]()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_the_same(name, training):
    layer, x = learned(name).train(training), example()
    other = copy.deepcopy(layer)
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    layer, exact, x = learned(name).eval(), learned(name).eval(), example()
    expected = exact(x)
    for found in (layer.bfloat16()(x.bfloat16()), _autocast(exact, x.bfloat16())):
        assert bool(torch.isfinite(found.float()).all())
        close = 0.1 if name in ROUGH else 0.03
        error = (found.float() - expected).detach().abs().max()
        assert float(error) < close * max(1.0, float(expected.detach().abs().max()))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def _autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_input_gives_finite_numbers_and_gradients(name, value):
    layer = LAYERS[name]().train()
    x = torch.full((4, C, 5, 4), value, requires_grad=True)
    y = layer(x)
    assert bool(torch.isfinite(y).all())
    y.sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("name", LAYERS)
def test_not_a_number_comes_out(name):
    x = example()
    x[0, 0, 0, 0] = float("nan")
    for training in (True, False):
        y = learned(name).train(training)(x)
        assert bool(torch.isnan(y[0]).any())
        if not training:
            assert not bool(torch.isnan(y[1:]).any())


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    layer, x = learned(name), example()[:0]
    assert layer.eval()(x).shape == x.shape
    before = copy.deepcopy(layer.state_dict())
    with contextlib.suppress(UsageError):
        assert layer.train()(x).shape == x.shape
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", LAYERS)
def test_batch_of_one_and_maps_of_one_pixel(name):
    layer, x = learned(name), example(1)
    if name == "atac_global":
        with pytest.raises(UsageError, match="at least 2"):
            layer(x)
    else:
        assert bool(torch.isfinite(layer(x)).all())
    pixel = x[..., :1, :1]
    state = copy.deepcopy(layer.state_dict())
    if name in BATCH:
        with pytest.raises(UsageError, match="at least 2"):
            layer(pixel)
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert bool(torch.isfinite(layer.eval()(pixel)).all()) and layer(pixel).shape == pixel.shape


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("maxdropout")])
def test_another_width_is_refused(name):
    with pytest.raises((UsageError, RuntimeError), match=r"expected|Given"):
        LAYERS[name]()(torch.randn(2, 2 * C, 5, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_folds_are_exact_or_say_why_not(name):
    layer, x = learned(name).eval(), example()
    result = fold_layers(nn.Sequential(layer))
    torch.testing.assert_close(result.model(x), layer(x), atol=1e-5, rtol=1e-5)
    if name in FOLD:
        assert type(result.model[0]) is FOLD[name]
    else:
        assert len(result.kept["0"]) > 20
        with pytest.raises(Stays):
            folded_form(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_torch_export(name):
    layer, x = learned(name).eval(), example()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_surgery_folds_around_it_and_shrinks_it_exactly(name):
    from convette.surgery import apply, fold, trace

    model = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), learned(name), nn.ReLU(), nn.Conv2d(C, 3, 3), nn.Flatten()
    )
    model.append(nn.Linear(18, 2)).eval()
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(6))
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    torch.testing.assert_close(fold(model, x)(x), model(x), atol=1e-5, rtol=1e-5)
    graph = trace(model, x)
    assert "0" in {group.name for group in graph.groups} and not graph.frozen
    chosen = {group.name: torch.arange(1, 1 + max(1, group.size // 2)) for group in graph.groups}
    apply(model, graph.shrink(chosen), example=x, prove=True)  # raises unless it equals the masked network
    assert model[0].out_channels == 3
    model.train()(torch.randn(4, 3, 5, 4)).sum().backward()


def test_exported_to_onnx_they_agree(tmp_path):
    from convette.runtime import EngineSpec, export, prepare

    model, x = nn.Sequential(*(learned(name) for name in LAYERS)).eval(), example(2)
    path = export(model, x, tmp_path / "model.onnx")
    runner = prepare(EngineSpec.parse("onnxruntime:cpu"), path, x)
    found = torch.as_tensor(runner(x))
    runner.close()
    expected = model(x).detach()
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


COMPILE = """
import sys
import torch
from tests.layers.test_every_layer import LAYERS, example
torch.set_num_threads(1)
failed = []
for name in LAYERS:
    torch._dynamo.reset()
    torch.manual_seed(1)
    compiled = torch.compile(LAYERS[name]().train(), fullgraph=True, backend="aot_eager")
    try:
        compiled(example().requires_grad_()).square().sum().backward()
    except Exception as error:
        failed.append(f"{name}: {str(error)[:300]}")
print("\\n".join(failed))
sys.exit(len(failed))
"""


def test_training_compiles_without_a_graph_break():
    """In a process of its own: the checks of shape annotations in tests are code that no graph holds."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
