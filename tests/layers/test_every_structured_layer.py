"""What holds for factorised, complex, hyperbolic, routing and higher-order layers: odd input, state, export, surgery."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays, fold_layers, folded_form
from convette.layers.attention import HigherOrderBlock
from convette.layers.complex import (
    Cardioid,
    ComplexBatchNorm2d,
    ComplexConv2d,
    ComplexConvTranspose2d,
    ComplexDropout,
    ComplexMaxPool2d,
    ModReLU,
    ZReLU,
    as_complex,
)
from convette.layers.convolution import FactorizedConv2d
from convette.layers.hyperbolic import PoincareBatchNorm2d, PoincareBlock, PoincareConv2d
from convette.layers.routing import CrossConnection, PathMean, Paths, StaticRouting

C = 8
LAYERS = {
    "factorized": lambda: FactorizedConv2d(C, C, 3, padding=1),
    "factorized_svd": lambda: FactorizedConv2d(C, C, 3, padding=1, form="svd"),
    "factorized_cp": lambda: FactorizedConv2d(C, C, 3, padding=1, form="cp", rank=4),
    "higher_order": lambda: HigherOrderBlock(C),
    "higher_order_softmax": lambda: HigherOrderBlock(C, norm="softmax"),
    "higher_order_l2": lambda: HigherOrderBlock(C, norm="l2", groups=1),
    "cross": lambda: CrossConnection(C // 2, 2),
    "cross_in": lambda: CrossConnection(C // 4, 4, normalize="in"),
    "static": lambda: StaticRouting(torch.tensor([[0.9, 0.1], [0.3, 0.7]])),
    "paths": lambda: nn.Sequential(
        Paths([nn.Conv2d(C // 2, C, 3, padding=1), nn.Conv2d(C // 2, C, 3, padding=1)]), PathMean(2)
    ),
    "complex": lambda: ComplexConv2d(C // 2, C // 2, 3, padding=1),
    "complex_three": lambda: ComplexConv2d(C // 2, C // 2, 3, padding=1, method="karatsuba"),
    "complex_up": lambda: ComplexConvTranspose2d(C // 2, C // 2, 3, padding=1),
    "complex_norm": lambda: ComplexBatchNorm2d(C // 2),
    "complex_norm_naive": lambda: ComplexBatchNorm2d(C // 2, mode="naive"),
    "complex_norm_magnitude": lambda: ComplexBatchNorm2d(C // 2, mode="magnitude"),
    "modrelu": lambda: ModReLU(C // 2),
    "zrelu": ZReLU,
    "cardioid": Cardioid,
    "complex_pool": lambda: ComplexMaxPool2d(3, 1, 1),
    "complex_dropout": ComplexDropout,
    "poincare": lambda: PoincareConv2d(C, C, 3, padding=1),
    "poincare_norm": lambda: PoincareBatchNorm2d(C),
    "poincare_block": lambda: PoincareBlock(C, C),
}
# Norms inside: one value a channel is refused in training.
BATCH = tuple(name for name in LAYERS if name.startswith(("higher", "complex_norm", "poincare_norm", "poincare_block")))
PLAIN = ("factorized", "factorized_svd", "factorized_cp", "complex", "complex_three", "complex_up", "complex_norm")
PLAIN += ("complex_norm_naive", "complex_norm_magnitude")
STAY = ("higher_order", "cross", "static", "poincare", "poincare_norm")
# What bfloat16 leaves of three convolutions in a row, or of whitening.
ROUGH = 0.1


def example(count=8):
    return torch.randn(count, C, 5, 4, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


def learned(name):
    """A layer after two training batches, its parameters moved a little."""
    torch.manual_seed(5)
    layer = LAYERS[name]().train()
    with torch.no_grad():
        for parameter in layer.parameters():
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
    layer, x = learned(name).train(training and name != "complex_dropout"), example()
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    layer, exact, x = learned(name).eval(), learned(name).eval(), example()
    expected = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact(x.bfloat16())
    whole = layer.bfloat16()(x.bfloat16())
    assert whole.dtype == torch.bfloat16
    for found in (whole, mixed):
        assert bool(torch.isfinite(found.float()).all())
        if name == "complex_pool":  # rounding decides between numbers of nearly one size
            found, expected = (as_complex(item.float()).abs() for item in (found, exact(x)))
        assert float((found.float() - expected).abs().max()) < ROUGH * max(1.0, float(expected.abs().max()))


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
def test_not_a_number_comes_out_and_spoils_nothing(name):
    x = example()
    x[0, 0, 0, 0] = float("nan")
    layer = learned(name)
    if name not in ("complex_dropout", "zrelu", "complex_pool"):
        assert bool(torch.isnan(layer.train()(x)[0]).any())
        if "higher" not in name:  # PyTorch's own batch norms keep what they have seen
            assert all(bool(torch.isfinite(buffer).all()) for buffer in layer.buffers())
    y = learned(name).eval()(x)
    assert bool(torch.isnan(y[0]).any()) and not bool(torch.isnan(y[1:]).any())


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
    assert bool(torch.isfinite(layer(x)).all())
    pixel, state = x[..., :1, :1], copy.deepcopy(layer.state_dict())
    if name in BATCH:
        with pytest.raises(UsageError, match="at least 2"):
            layer(pixel)
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert bool(torch.isfinite(layer.eval()(pixel)).all()) and layer(pixel).shape == pixel.shape


@pytest.mark.parametrize("name", LAYERS)
def test_folds_are_exact_or_say_why_not(name):
    layer = learned(name).eval()
    x = example()
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    result = fold_layers(nn.Sequential(layer))
    torch.testing.assert_close(result.model(x), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    if name in PLAIN:
        assert not result.kept and all(type(m).__module__.startswith("torch") for m in result.model.modules())
    elif name in STAY:
        with pytest.raises(Stays) as reason:
            folded_form(layer)
        assert len(str(reason.value)) > 40


@pytest.mark.parametrize("name", LAYERS)
def test_torch_export(name):
    layer, x = learned(name).eval(), example()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-5)


def network(name):
    """A network around the layer, its batch norms with statistics."""
    layer = learned(name)
    last = [nn.ReLU(), nn.Conv2d(C, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(18, 2)]
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), layer, *last).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    torch.manual_seed(6)
    return model, torch.randn(2, 3, 5, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_surgery_folds_around_it_and_shrinks_it_exactly(name):
    from convette.surgery import apply, fold, trace

    model, x = network(name)
    torch.testing.assert_close(fold(model, x)(x), model(x), atol=1e-4, rtol=1e-4)
    graph = trace(model, x)
    assert not graph.frozen
    chosen = {group.name: torch.arange(max(1, group.size // 2)) for group in graph.groups}
    before = sum(p.numel() for p in model.parameters())
    apply(model, graph.shrink(chosen), example=x, prove=True)  # raises unless it equals the masked network
    assert sum(p.numel() for p in model.parameters()) < before


# One of each make: exporting and compiling are slow.
EXPORTED = ["factorized", "higher_order_l2", "cross", "complex", "complex_norm", "cardioid", "complex_pool"]
EXPORTED += ["poincare", "poincare_norm"]


def test_exported_to_onnx_they_agree(tmp_path):
    """One file with one layer of each make."""
    from convette.runtime import EngineSpec, export, prepare

    torch.manual_seed(7)
    layers = [learned(name) for name in EXPORTED]
    # A norm between, so that numbers stay of one size.
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GroupNorm(2, C))]).eval()
    x = example(2)
    path = export(model, x, tmp_path / "model.onnx")
    runner = prepare(EngineSpec.parse("onnxruntime:cpu"), path, x)
    found = torch.as_tensor(runner(x))
    runner.close()
    torch.testing.assert_close(found, model(x).detach(), atol=1e-3, rtol=1e-3)


COMPILED = ["cross", "complex_norm", "poincare_norm"]
COMPILE = """
import sys
import torch
from tests.layers.test_every_structured_layer import COMPILED, LAYERS, example
torch.set_num_threads(1)
failed = []
for name in COMPILED:
    torch._dynamo.reset()
    layer = LAYERS[name]().train()
    torch.manual_seed(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
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
