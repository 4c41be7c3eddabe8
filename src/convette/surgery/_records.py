"""What a trace notes down: values, calls, sizes in Python, statistics over channels."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Layers = tuple[Tensor, ...]


class Value(NamedTuple):
    """What is known of one tensor: its layers, whether it comes from parameters alone, and which call made it.

    `blank` is the call that created it as zeros, ones or the like, -1 for any other: such a tensor belongs to nobody
    until it meets something, and then takes the channels it meets.
    """

    layers: Layers
    weight: bool
    call: int
    blank: int = -1


@dataclass(slots=True)
class Call:
    """One function call of the network."""

    index: int
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    occurrence: int

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument at `position` or called `name`."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def first(self) -> Tensor:
        """The tensor the function works on."""
        return self.args[0] if self.args else self.kwargs["input"]

    def on(self, tensor: Tensor) -> Any:
        """Call the same function with the same arguments on `tensor`."""
        if self.args:
            return self.func(tensor, *self.args[1:], **self.kwargs)
        return self.func(**{**self.kwargs, "input": tensor})


class Operand(NamedTuple):
    """A value spread over a common shape: along which axes it has its full size, and its layers in that shape.

    `blank` is set for a tensor of zeros or the like that meets channels here for the first time.
    """

    full: tuple[bool, ...]
    layers: Layers
    blank: "tuple[SizeCall, torch.Size] | None" = None


@dataclass(frozen=True)
class FrozenOperator:
    """A function that fixed the channels it touched: its name, the module that was running and the source line."""

    name: str
    module: str
    where: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.name} in {self.module or 'the model'} ({self.where})"


@dataclass
class SizeCall:
    """A call whose arguments hold sizes that change with the channels, and what it takes to find the new ones."""

    call: int
    name: str
    module: str
    where: str
    kind: str  # shape, slice, split, pad, roll, gather, groups, normalized_shape
    axis: int
    given: Any
    inputs: Layers
    outputs: tuple[Layers, ...]
    occurrence: int


@dataclass
class Scope:
    """A call whose result depends on a statistic over channels: removing one changes the others by nature."""

    call: int
    name: str
    module: str
    axes: tuple[int, ...]
    layers: Layers
    inputs: tuple[Layers, ...]
    outputs: tuple[Layers, ...] = ()


@dataclass
class Fixed:
    """`chosen` was picked by a constant index along `axis` of `layer`, which therefore must not shrink there."""

    layer: Tensor
    axis: int
    chosen: Tensor


@dataclass
class Step:
    """A convolution, linear or batch norm that a module ran on its own weight, and the call whose result it read."""

    module: str
    source: int


@dataclass
class Records:
    """What the trace noted besides unions, for solving and for applying edits."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    frozen: list[FrozenOperator] = field(default_factory=list)
    sizes: list[SizeCall] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    boxes: list[tuple[Tensor, int]] = field(default_factory=list)
    fixed: list[Fixed] = field(default_factory=list)
    whole_groups: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # module -> input labels, groups
    heads: dict[str, tuple[int, Tensor]] = field(default_factory=dict)  # nn.MultiheadAttention -> heads
    scalars: dict[int, SizeCall] = field(default_factory=dict)  # calls given Python numbers
    unseen: set[str] = field(default_factory=set)  # modules that read tensors nobody saw being made
    blanks: dict[int, SizeCall] = field(default_factory=dict)  # calls that create zeros, ones...
    uses: dict[int, int] = field(default_factory=dict)  # call -> how often its result was read
    steps: dict[int, Step] = field(default_factory=dict)  # calls that may be folded
    needed: str = ""  # why the run took values; empty where shapes were enough
