"""Counting what a network costs, by running it once."""

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from convette.cost._cost import Cost, LayerCost
from convette.cost._formulas import FAMILIES
from convette.cost._recorder import Operation, Recorder, Visit
from convette.errors import UsageError

# A tensor, a list (one argument), a tuple of positional arguments, or a mapping of keyword arguments.
Example: TypeAlias = Tensor | list[Any] | tuple[Any, ...] | Mapping[str, Any]


def count(model: nn.Module, example: Example) -> Cost:
    """Run `model` once on `example` and count what it does; latency is left out (see `measure`).

    What is counted is what the dispatcher of PyTorch runs, so functional and standardised convolutions, linears on
    sequences, einsum and the fused attention of nn.MultiheadAttention and the transformer encoder are all in it.
    The run is in evaluation mode without gradients; mode, parameters, buffers and random state are afterwards as
    before. `model` may live on any device, "meta" too (nothing is computed then); `example` is moved there.

    Args:
        model: the network.
        example: a tensor, a tuple (positional arguments) or a dict (keyword arguments). The counts are for all of it:
            use a batch of one for the cost of one image.

    Returns:
        The counts, with one row a module.

    Raises:
        UsageError: the network cannot be run on the example.

    Cost: one forward run.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: the same network, under its own names
    recorder = record(model, example)
    layers = _layers(model, recorder.operations, recorder.visits)
    size, buffer_size = state_bytes(model)
    families = {family: sum(op.macs for op in recorder.operations if op.family == family) for family in FAMILIES}
    return Cost(
        parameters=count_parameters(model),
        macs=sum(op.macs for op in recorder.operations),
        size=size,
        memory=recorder.peak,
        layers=layers,
        norm_macs=sum(op.norm for op in recorder.operations),
        bias_macs=sum(op.bias for op in recorder.operations),
        families={family: macs for family, macs in families.items() if macs},
        buffer_size=buffer_size,
        inputs=describe_inputs(example),
        uncounted=tuple(sorted(recorder.uncounted)),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of `model`; one that several modules share is counted once.

    Weights that a layer stores packed are counted as the numbers they stand for (its ``stored_weights``).
    """
    packed = sum(int(getattr(module, "stored_weights", 0)) for module in model.modules())
    return sum(parameter.numel() for parameter in model.parameters()) + packed


def state_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the tensors a file of `model` holds: parameters with persistent buffers, and the buffers alone."""
    parameters = {id(p) for p in model.parameters()}
    seen: set[int] = set()
    total = buffers = 0
    for x in model.state_dict(keep_vars=True).values():
        if not isinstance(x, Tensor) or id(x) in seen:
            continue
        seen.add(id(x))
        total += x.numel() * x.element_size()
        buffers += 0 if id(x) in parameters else x.numel() * x.element_size()
    return total, buffers


def describe_inputs(example: Example) -> str:
    """The shapes of an example as text: ``1x3x224x224``."""
    return ", ".join("x".join(map(str, x.shape)) or "scalar" for x in tree_leaves(example) if isinstance(x, Tensor))


def record(model: nn.Module, example: Example) -> Recorder:
    """Run `model` on `example` under a `Recorder`, leaving the network and the random state as they were."""
    _refuse_lazy(model)
    example = _moved(example, _device_of(model))
    args, kwargs = as_arguments(example)
    recorder = Recorder(model, (args, kwargs))
    try:
        with _undisturbed(model), recorder.watching_modules():
            try:
                with torch.inference_mode(False), torch.no_grad(), _without_compiling(), recorder:
                    _run(model, args, kwargs)
            finally:
                recorder.restore()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        from convette.surgery import raised_at

        text = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        line = raised_at(error)
        raise UsageError(
            f"{type(model).__name__} cannot be run on the example ({describe_inputs(example)}): "
            f"{text}{'' if line == '?' else f' ({line})'}. Give an example of the shape the network takes."
        ) from error
    return recorder


def as_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example into positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # In a function of its own: the result must be freed before the recorder is left.
    model(*args, **kwargs)


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise UsageError(
                f"{name} of {type(model).__name__} has no shape yet: run the network once before counting."
            )


def _device_of(model: nn.Module) -> torch.device | None:
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    return None if tensor is None else tensor.device


def _moved(example: Example, device: torch.device | None) -> Example:
    if device is None:
        return example
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) and x.device != device else x, example)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, attributes of the modules and random state are as before."""
    state = random.getstate()
    before = [(module, module.training, dict(module.__dict__), _containers(module)) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            with contextlib.suppress(NotImplementedError):  # exported programs have but one mode
                model.eval()
            yield
    finally:
        for module, training, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module.training = training
            for container, contents in containers:
                _put_back(container, contents)
        random.setstate(state)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    # Parameters and buffers, but also what modules cache at inference (LeViT its attention biases).
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, (dict, list, set))]


def _put_back(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    else:
        container.clear()
        container.update(contents)


@contextlib.contextmanager
def _without_compiling() -> Iterator[None]:
    # What torch.compile fuses the dispatcher no longer sees; what was compiled runs as written here.
    # Asking for that loads the compiler (seconds), so only where it is loaded, or flex_attention would load it.
    if {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _layers(model: nn.Module, operations: list[Operation], visits: Mapping[str, Visit]) -> tuple[LayerCost, ...]:
    seen: set[int] = set()
    found: list[tuple[float, LayerCost]] = []
    by_module: dict[str, list[Operation]] = {}
    for operation in operations:
        by_module.setdefault(operation.module, []).append(operation)
    for name, module in model.named_modules():
        own = {id(p): p.numel() for p in module._parameters.values() if p is not None and id(p) not in seen}
        seen.update(own)
        ran = by_module.get(name, [])
        if not own and not ran:
            continue
        visit = visits.get(name)
        row = LayerCost(
            name=name,
            kind=type(module).__name__,
            macs=sum(op.macs for op in ran),
            parameters=sum(own.values()) + int(getattr(module, "stored_weights", 0)),
            output_shape=visit.shape if visit else (),
            norm_macs=sum(op.norm for op in ran),
            bias_macs=sum(op.bias for op in ran),
            calls=visit.calls if visit else 0,
        )
        found.append((visit.order if visit else float("inf"), row))
    return tuple(row for _, row in sorted(found, key=lambda pair: pair[0]))
