"""What the readers of a unit see of it: hooks for a while on the modules that read a group, the network unchanged."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from convette.errors import StructureError, UsageError
from convette.layers import _watching
from convette.layers._watching import call as run
from convette.layers._watching import in_eval, keeping_gradients
from convette.pruning._units import tensors_of
from convette.surgery import ChannelGraph, Group, Member

Batch = tuple[Any, Any]
# See(group, reader, values): the values are (images, units, channels of a unit, *positions).
See = Callable[[str, "Reader", Tensor], None]


@dataclass(frozen=True)
class Reader:
    """A module that reads the units of a group: unit u arrives as ``channels[u]`` along `axis` of what it reads.

    `through`: "input" (what the module is called with), "heads" (what the output projection of an
    ``nn.MultiheadAttention`` reads inside of it) or "output" (no reader is known: what the module gives out).
    """

    module: str
    parameter: str
    axis: int
    channels: Tensor
    through: str = "input"

    def take(self, value: Tensor) -> Tensor:
        """Return the units in `value`: (images, units, channels of a unit, *positions)."""
        index = self.channels.to(value.device).flatten()
        if value.shape[self.axis] <= int(self.channels.max()):
            raise StructureError(f"{self.module}: reads {tuple(value.shape)}, too small for the channels traced.")
        found = value.index_select(self.axis, index).movedim(self.axis, 1)
        return found.unflatten(1, tuple(self.channels.shape))


def find_readers(model: nn.Module, graph: ChannelGraph) -> dict[str, list[Reader]]:
    """Return for every group the modules that read it; those that make it where no reader can be watched."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = tensors_of(model)
    found = {}
    for group in graph.groups:
        if not group.size:
            continue
        readers = [r for m in group.of("consumer") if (r := _reader(m, modules, tensors)) is not None]
        if not readers:
            readers = [r for m in group.of("producer") if (r := _maker(m, modules)) is not None]
        if readers:
            found[group.name] = readers
    return found


def is_convolution(module: nn.Module) -> bool:
    """Say whether `module` convolves its input with its weight (transposed or not)."""
    return isinstance(module, nn.modules.conv._ConvNd)


def _reader(member: Member, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Reader | None:
    module = modules.get(member.module)
    if isinstance(module, nn.MultiheadAttention) and member.parameter.endswith("out_proj.weight"):
        return Reader(member.module, member.parameter, -1, member.index, "heads")
    if isinstance(module, nn.MultiheadAttention) and member.parameter.endswith("in_proj_weight"):
        return Reader(member.module, member.parameter, -1, member.index)
    if module is None or member.parameter != f"{member.module}.weight" or tensors[member.parameter].ndim < 2:
        return None
    if isinstance(module, nn.Linear):
        return Reader(member.module, member.parameter, -1, member.index)
    if is_convolution(module):
        return Reader(member.module, member.parameter, 1, input_channels(module, member))
    return None


def _maker(member: Member, modules: dict[str, nn.Module]) -> Reader | None:
    module = modules.get(member.module)
    if module is None or member.parameter != f"{member.module}.weight":
        return None
    if isinstance(module, nn.Linear):
        return Reader(member.module, member.parameter, -1, member.index, "output")
    if is_convolution(module) and not getattr(module, "transposed", False):
        return Reader(member.module, member.parameter, 1, member.index, "output")
    return None


def input_channels(module: Any, member: Member) -> Tensor:
    """Return the input channels that hold each unit; the columns of a grouped convolution serve every group of it."""
    if module.groups == 1 or module.transposed:
        return member.index
    width = module.in_channels // module.groups
    return torch.cat([member.index + part * width for part in range(module.groups)], dim=1)


@contextlib.contextmanager
def watching(model: nn.Module, readers: dict[str, list[Reader]], see: See) -> Iterator[None]:
    """Call ``see(group, reader, units)`` whenever a reader runs; the hooks are gone afterwards."""

    def note(watched: list[tuple[str, Reader]], value: Tensor) -> None:
        for group, reader in watched:
            see(group, reader, reader.take(value))

    with hooked(model, readers, note):
        yield


@contextlib.contextmanager
def hooked(
    model: nn.Module,
    readers: dict[str, list[Reader]],
    note: Callable[[list[tuple[str, Reader]], Tensor], None],
    *,
    copies: bool = False,
) -> Iterator[None]:
    """Call ``note(groups and readers, tensor)`` with what readers read. With `copies` each module goes on with a copy
    of its own, the tensor that `note` is given, so that gradients with respect to it are those of this reader alone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds: dict[tuple[str, str], list[tuple[str, Reader]]] = {}
    for group, found in readers.items():
        for reader in found:
            kinds.setdefault((reader.module, reader.through), []).append((group, reader))
    handles = []
    for (name, through), watched in kinds.items():
        if through == "input":
            hook = _input_hook(watched, note, copies)
            handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        else:
            hook = _heads_hook(watched, note, copies) if through == "heads" else _output_hook(watched, note, copies)
            handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
    with _watching.hooked(handles):
        yield


def _input_hook(watched: list, note: Callable, copies: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if isinstance(module, nn.MultiheadAttention):
            return _self_attention(module, watched, note, copies, args, kwargs)
        value = args[0] if args else kwargs["input"]
        value = value * 1 if copies else value
        note(watched, value)
        if not copies:
            return None
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "input": value})

    return hook


def _self_attention(module: Any, watched: list, note: Callable, copies: bool, args: tuple, kwargs: dict) -> Any:
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    value = given["query"]
    if not (given["key"] is value and given["value"] is value):
        return None  # three inputs, and one set of columns for all: nothing that can be said of one of them
    value = _images_first(module, value) * 1 if copies else _images_first(module, value)
    note(watched, value)
    if not copies:
        return None
    value = _images_first(module, value)
    rest = {name: item for name, item in kwargs.items() if name not in ("query", "key", "value")}
    return (value, value, value, *args[3:]), rest


def _images_first(module: Any, value: Tensor) -> Tensor:
    """Swap tokens and images where an attention module takes the tokens first; its own inverse."""
    return value if module.batch_first or value.ndim < 3 else value.transpose(0, 1)


def _output_hook(watched: list, note: Callable, copies: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        value = output * 1 if copies else output
        note(watched, value)
        return value if copies else None

    return hook


def _heads_hook(watched: list, note: Callable, copies: bool) -> Callable:
    def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        value = _images_first(module, _heads(module, args, kwargs))
        note(watched, value)
        projected = functional.linear(_images_first(module, value), module.out_proj.weight, module.out_proj.bias)
        return (projected, *output[1:]) if copies else None

    return hook


def _heads(module: Any, args: tuple, kwargs: dict) -> Tensor:
    """Return what the output projection of an attention module reads: its output with an identity for projection."""
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    before, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
    try:
        eye = torch.eye(module.embed_dim, dtype=module.out_proj.weight.dtype, device=module.out_proj.weight.device)
        weights = {"out_proj.weight": eye}
        if module.out_proj.bias is not None:
            weights["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        return functional_call(module, weights, args, kwargs)[0]
    finally:
        module._forward_hooks, module._forward_pre_hooks = hooks, before


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode for a while; flags, ``requires_grad`` and the random state come back afterwards."""
    fast = torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_eval(model), keeping_gradients(model.parameters()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_rng_state(state)


def observe(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Batch] | None,
    see: See,
    criterion: str,
    *,
    finish: Callable[[Any, Any], None] | None = None,
) -> dict[str, list[Reader]]:
    """Run `model` over the calibration batches in eval mode, without gradients, and let `see` see every group.

    ``finish(outputs, labels)`` is called after each batch. Returns the readers. Raises `UsageError` without data or
    where no group can be watched.
    """
    readers = watched_groups(model, graph, criterion)
    with scoring(model), watching(model, readers, see), torch.no_grad():
        for images, labels in batches_of(calibration, criterion):
            outputs = run(model, images)
            if finish is not None:
                finish(outputs, labels)
    return readers


def watched_groups(model: nn.Module, graph: ChannelGraph, criterion: str) -> dict[str, list[Reader]]:
    """Return `find_readers`; raise `UsageError` if no group has any."""
    readers = find_readers(model, graph)
    if not readers:
        raise UsageError(f"criterion {criterion}: no convolution or linear layer reads a removable channel; use l2.")
    return readers


def batches_of(calibration: Iterable[Batch] | None, criterion: str) -> Sequence[Batch]:
    """Return the calibration batches as a list; `UsageError` if there is no image among them."""
    batches = [batch for batch in calibration or () if len(batch[1])]
    if not batches:
        raise UsageError(
            f"criterion {criterion} needs calibration images and labels: give a data set, or use l1, l2 or lamp."
        )
    return batches


def sample_saliencies(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor],
    criterion: str,
) -> Iterator[dict[str, Tensor]]:
    r"""Yield for every batch and group the derivatives (images x units) of each image's loss by the gates of its units.

    A gate multiplies what every reader reads of a unit; at 1 its derivative is
    :math:`\sum_{r,h,w} x_{r,u,h,w}\, \partial L_n / \partial x_{r,u,h,w}`. `loss` is the mean over a batch.
    """
    readers = watched_groups(model, graph, criterion)
    seen: list[tuple[list[tuple[str, Reader]], Tensor]] = []
    with scoring(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for images, labels in batches_of(calibration, criterion):
            with hooked(model, readers, lambda watched, value: seen.append((watched, value)), copies=True):
                total = loss(run(model, images), labels) * len(labels)
            gradients = torch.autograd.grad(total, [value for _, value in seen], allow_unused=True)
            found: dict[str, Tensor] = {}
            for (watched, value), gradient in zip(seen, gradients, strict=True):
                product = (gradient * value).detach().float() if gradient is not None else torch.zeros_like(value)
                for group, reader in watched:
                    here = reader.take(product).flatten(2).sum(dim=2).cpu()
                    found[group] = found[group] + here if group in found else here
            seen.clear()
            yield found


def unit_rows(tensor: Tensor, member: Member) -> Tensor:
    """Return what each unit owns of `tensor` (the member's parameter) as a row: (units, entries)."""
    return tensor.movedim(member.dim, 0)[member.index.to(tensor.device)].reshape(member.index.shape[0], -1)


def producer_rows(group: Group, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the producer weights of every unit of `group` side by side, (units, entries), None without any."""
    rows = [
        unit_rows(tensors[m.parameter].detach().float(), m).cpu()
        for m in group.of("producer")
        if tensors[m.parameter].ndim > 1
    ]
    return torch.cat(rows, dim=1) if rows else None
