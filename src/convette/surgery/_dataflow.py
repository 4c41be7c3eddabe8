"""Which call read which call's result, in one run of a network."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from convette.layers._watching import call, hooked
from convette.surgery._calls import function_name, tensors_in
from convette.surgery._rules import READS
from convette.surgery._trace import evaluating, outputs_of

_TAG = "_convette_flow"


@dataclass
class Node:
    """One call: the function, the module that was running, the calls it read (-1: input or constant) and the
    parameters; the calls that read its result; the shape of that. `constants` tells inputs and constants apart."""

    name: str
    module: str
    sources: list[int]
    parameters: list[str]
    shape: tuple[int, ...]
    readers: list[int] = field(default_factory=list)
    constants: tuple[int, ...] = ()


class Flow(TorchFunctionMode):
    """Records every call of a network; see `dataflow`."""

    def __init__(self, model: nn.Module) -> None:
        """Get ready for one run of `model`."""
        super().__init__()
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(tensor): name for name, tensor in model.named_parameters()}
        self.stack: list[str] = [""]
        self.nodes: list[Node] = []
        self.held: list[Tensor] = []

    def enter(self, module: nn.Module, _: Any) -> None:
        """Note that a module starts to run."""
        self.stack.append(self.module_names.get(id(module), self.stack[-1]))

    def leave(self, module: nn.Module, _: Any, __: Any) -> None:
        """Note that a module has run."""
        self.stack.pop()

    @contextlib.contextmanager
    def following_modules(self) -> Iterator[None]:
        """Let `enter` and `leave` know of every module that runs."""
        before = module_hooks.register_module_forward_pre_hook(self.enter)
        after = module_hooks.register_module_forward_hook(self.leave, always_call=True)
        with hooked([before, after]):
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out the call and note it."""
        kwargs = kwargs or {}
        name = function_name(func)
        out = func(*args, **kwargs)
        results = [] if name in READS else tensors_in([out], [])
        if not results:
            return out
        inputs = tensors_in([args, kwargs], [])
        sources = [self.source(tensor) for tensor in inputs if id(tensor) not in self.parameters]
        parameters = [self.parameters[id(tensor)] for tensor in inputs if id(tensor) in self.parameters]
        index = len(self.nodes)
        constants = [tensor for tensor in inputs if id(tensor) not in self.parameters and self.source(tensor) < 0]
        self.held += constants  # so that their ids stay theirs
        shape = tuple(results[0].shape)
        self.nodes.append(Node(name, self.stack[-1], sources, parameters, shape, constants=tuple(map(id, constants))))
        for source in sources:
            if source >= 0:
                self.nodes[source].readers.append(index)
        for tensor in results:
            if id(tensor) not in self.parameters:
                setattr(tensor, _TAG, (self, index))
        return out

    def source(self, tensor: Tensor) -> int:
        """Return the call that made `tensor`, -1 for none."""
        tag = tensor.__dict__.get(_TAG)
        return tag[1] if tag is not None and tag[0] is self else -1


def dataflow(model: nn.Module, example: Any) -> Sequence[Node]:
    """Run `model` once on `example`, in eval mode, and return its calls; results it gives out have one reader more."""
    flow = Flow(model)
    with flow.following_modules(), evaluating(model), flow:
        output = call(model, example)
    for tensor in outputs_of(output, []):
        source = flow.source(tensor)
        if source >= 0:
            flow.nodes[source].readers.append(-1)
    return flow.nodes
