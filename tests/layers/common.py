"""What is asked of every layer in the same way: odd input, state, folds, export, compilation, surgery around it."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from convette.errors import UsageError
from convette.layers import fold_layers


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned(make, batch, move=True):
    """A layer after two training batches, its parameters moved a little."""
    torch.manual_seed(5)
    layer = make().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            if move:
                parameter.add_(0.05 * torch.rand_like(parameter))
    for _ in range(2):
        layer(batch)
    return layer


def check_state_and_copies(make, layer, x):
    """A fresh layer with the same state, and a copy, compute the same."""
    fresh = make()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def check_examples_are_alone(layer, x):
    """What an example gives does not depend on the others of its batch."""
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), atol=1e-5, rtol=1e-5)


def check_channels_last(layer, x, tolerance=1e-5):
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    found = other(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, layer(x), atol=tolerance, rtol=tolerance)


def check_constant_input(layer, x):
    """Finite numbers and gradients, where deviations are 0."""
    x = x.clone().requires_grad_()
    y = layer(x)
    assert bool(torch.isfinite(y).all())
    y.sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all())


def check_empty_batch(layer, x):
    """No examples give none, and change nothing of the layer."""
    shape = layer.eval()(x).shape[1:]
    assert layer(x[:0]).shape == (0, *shape)
    before = copy.deepcopy(layer.state_dict())
    with contextlib.suppress(UsageError):
        assert layer.train()(x[:0]).shape == (0, *shape)
    check_unchanged(layer, before)


def check_unchanged(layer, before):
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def check_one_value_is_refused(layer, x, match="at least 2"):
    """One value a channel is refused in training, and leaves no trace."""
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(UsageError, match=match):
        layer.train()(x)
    check_unchanged(layer, before)


def check_folded(layer, x, tolerance=1e-5):
    """What `fold_layers` makes of a layer: the same function, or a reason for each part that stays."""
    expected, before = layer(x), copy.deepcopy(layer.state_dict())
    result = fold_layers(nn.Sequential(layer))
    torch.testing.assert_close(result.model(x), expected, atol=tolerance, rtol=tolerance)
    check_unchanged(layer, before)
    assert all(len(reason) > 20 for reason in result.kept.values())
    return result


def check_torch_export(layer, x, tolerance=1e-6):
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), atol=tolerance, rtol=1e-5)


def network_around(layer, channels):
    """A network of maps (n, 3, 5, 4) with the layer behind its first convolution, its batch norms with statistics."""
    last = [nn.ReLU(), nn.Conv2d(channels, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(18, 2)]
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), layer, *last).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    torch.manual_seed(6)
    return model, torch.randn(2, 3, 5, 4)


def check_surgery(model, x, tolerance=1e-5, first=0):
    """Folds around the layer are exact, and so is the network with half of the units of every group, from `first` on."""
    from convette.surgery import apply, fold, trace

    torch.testing.assert_close(fold(model, x)(x), model(x), atol=tolerance, rtol=tolerance)
    graph = trace(model, x)
    chosen = {group.name: torch.arange(first, first + max(1, group.size // 2)) for group in graph.groups}
    before = sum(p.numel() for p in model.parameters())
    apply(model, graph.shrink(chosen), example=x, prove=True)  # raises unless it equals the masked network
    assert sum(p.numel() for p in model.parameters()) < before
    return graph


def check_onnx(model, x, folder, *, atol, rtol):
    """Exported to a file, run by ONNX Runtime, it computes the same."""
    from convette.runtime import EngineSpec, export, prepare

    path = export(model, x, folder / "model.onnx")
    runner = prepare(EngineSpec.parse("onnxruntime:cpu"), path, x)
    found = torch.as_tensor(runner(x))
    runner.close()
    torch.testing.assert_close(found, model(x).detach(), atol=atol, rtol=rtol)


def compile_each(cases):
    """Compile and train each layer of ``{name: (layer, batch)}`` for a step; print what failed, return how many."""
    torch.set_num_threads(1)
    failed = []
    for name, (layer, batch) in cases.items():
        torch._dynamo.reset()
        torch.manual_seed(1)
        compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
        try:
            compiled(batch.requires_grad_()).square().sum().backward()
        except Exception as error:
            failed.append(f"{name}: {str(error)[:300]}")
    print("\n".join(failed))
    return len(failed)


def check_compiles(module):
    """Training the ``compiled()`` of a test module compiles without a graph break.

    In a process of its own: the checks of shape annotations in tests are code that no graph holds.
    """
    code = f"import sys\nfrom {module} import compiled\nfrom {__name__} import compile_each\n"
    code += "sys.exit(compile_each(compiled()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
