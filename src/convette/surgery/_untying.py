"""Finding where a residual stream is read and added to, from the flow of one run; the `Untie` edit of it."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from convette.errors import StructureError
from convette.layers._watching import call
from convette.surgery._dataflow import Flow, Node
from convette.surgery._edits import find_module, find_tensor
from convette.surgery._graph import ChannelGraph
from convette.surgery._trace import evaluating
from convette.surgery._trial import trial_error
from convette.surgery._untie import Site, Untie

_SUMS = ("add", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__isub__")
# Where channels end up side by side: what reads the result reads other channels as well.
_MIXING = ("cat", "concat", "concatenate", "stack", "pixel_shuffle", "pixel_unshuffle", "im2col", "__setitem__")


def untie(graph: ChannelGraph, groups: str | Iterable[str] | None = None) -> Untie:
    """Return the edit that un-ties residual streams, proved on the graph's example: the outputs stay the same.

    `groups` names the groups whose streams are meant; None: all that are sums. Afterwards, in a new trace, every branch
    that is added to the stream has a group of its own (named as before it, by the layer that makes it), and so has
    everything that reads the stream (``"layer1.0.conv1.gather"``). Readers whose input is more than the stream (after
    a concatenation, say) go on reading it whole.

    Raises `StructureError` for a group to which nothing is added, or whose branches end outside any module.
    Cost: two runs and those of a proof.
    """
    named = [groups] if isinstance(groups, str) else None if groups is None else list(groups)
    wanted = [group.name for group in graph] if named is None else [graph[name].name for name in named]
    flow = _Modules(graph.model, graph.example)
    reads: dict[str, Site] = {}
    writes: dict[str, Site] = {}
    for name in wanted:
        found = _Stream(graph, name, flow).sites()
        if found is None:
            if named is not None:
                raise StructureError(f"group {name!r} is no residual stream: nothing is added to its channels.")
            continue
        reads |= {site.module: site for site in found[0]}
        writes |= {site.module: site for site in found[1]}
    if not writes:
        raise StructureError(f"{type(graph.model).__name__} has no residual stream: no channels are sums.")
    edit = Untie(tuple(reads.values()), tuple(writes.values()))
    error = trial_error(graph.model, [edit], graph.example, 1e-6)
    if not error <= 1e-6:
        raise StructureError(f"un-tying changes the outputs (relative error {error:.1e}); please report the network.")
    return edit


class _Modules(Flow):
    """The calls of one run, and for every module which call made what it reads and what it gives."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__(model)
        self.given: dict[int, list[str]] = {}  # call -> modules within which it was made, as their result; inner first
        self.begun: list[int] = []
        self.runs: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with self.following_modules(), evaluating(model), self:
            call(model, example)

    def enter(self, module: nn.Module, args: Any) -> None:
        super().enter(module, args)
        self.begun.append(len(self.nodes))
        name = self.stack[-1]
        self.runs[name] = self.runs.get(name, 0) + 1
        if isinstance(args, tuple) and args and isinstance(args[0], Tensor):
            self.shapes[name] = tuple(args[0].shape)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, begun = self.stack[-1], self.begun.pop()
        super().leave(module, args, output)
        source = self.source(output) if isinstance(output, Tensor) else -1
        # What a module only hands on (an identity) others may read past it.
        if source >= begun and name:
            self.given.setdefault(source, []).append(name)


class _Stream:
    """One group's channels through the calls: where they come from, and whether as a sum."""

    def __init__(self, graph: ChannelGraph, name: str, flow: _Modules) -> None:
        self.model, self.name, self.flow = graph.model, name, flow
        self.nodes: Sequence[Node] = flow.nodes
        group = graph[name]
        weights = [m for m in group.members if find_tensor(graph.model, m.parameter).ndim > 1]
        self.made_by = {m.module for m in weights if m.role == "producer"}
        self.read_by = {m.module for m in weights}
        self.whole: set[int] = set()  # calls whose results will be given at the stream's full width
        self.origin: list[frozenset[str]] = []
        self.stream: list[bool] = []
        self.joins: list[bool] = []
        self._follow()

    def _weighs(self, node: Node) -> bool:
        """Tell whether a call multiplies with a weight: its result is other channels than what it reads."""
        return any(find_tensor(self.model, name).ndim > 1 and name.endswith("weight") for name in node.parameters)

    def _follow(self) -> None:
        self.origin, self.stream, self.joins = [], [], []
        for number, node in enumerate(self.nodes):
            sources = [s for s in node.sources if s >= 0 and self.origin[s]]
            if self._weighs(node):
                made = node.module in self.made_by
                origin, stream, join = frozenset([f"{node.module}:{number}"] if made else []), False, False
            else:
                origin = frozenset().union(*(self.origin[s] for s in sources))
                join = node.name in _SUMS and len(sources) > 1 and len({self.origin[s] for s in sources}) > 1
                stream = bool(sources) and (join or all(self.stream[s] for s in sources))
                stream = stream and node.name not in _MIXING
            self.origin.append(origin)
            self.joins.append(join)
            self.stream.append(stream or number in self.whole)

    def sites(self) -> tuple[list[Site], list[Site]] | None:
        """Return the places that read and write the stream; None where nothing is added to these channels."""
        writes: dict[str, Site] = {}
        joins = [number for number, join in enumerate(self.joins) if join]
        if not joins:
            return None
        for number in joins:
            for source in self.nodes[number].sources:
                if source >= 0 and self.origin[source] and not self.stream[source] and source not in self.whole:
                    module, end = self._end(source)
                    self.whole |= {end, source}
                    writes[module] = self._write(module, end)
        self._follow()
        reads: dict[str, Site] = {}
        for node in self.nodes:
            if node.module in self.read_by and self._weighs(node) and node.sources and node.sources[0] >= 0:
                source = node.sources[0]
                if self.stream[source] and self.flow.runs.get(node.module) == 1:
                    module = self._start(node.module, source)
                    layer, shape = find_module(self.model, module), self.flow.shapes[module]
                    last = isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm
                    dim = len(shape) - 1 if last else 1
                    reads[module] = Site(module, shape[dim], dim)
        return list(reads.values()), list(writes.values())

    def _write(self, module: str, end: int) -> Site:
        """Return the place of a scatter behind `module`, whose result call `end` gives."""
        shape = self.nodes[end].shape
        maker = sorted(self.origin[end])[0].partition(":")[0]
        layer = find_module(self.model, maker)
        width = int(layer.weight.shape[0])  # type: ignore[union-attr,operator]
        order = [len(shape) - 1, 1] if isinstance(layer, nn.Linear) else [1, len(shape) - 1]
        dim = next((dim for dim in order if shape[dim] == width), None)
        if dim is None:
            raise StructureError(f"group {self.name!r}: {module!r} gives {shape}, not {width} channels.")
        return Site(module, width, dim)

    def _end(self, source: int) -> tuple[str, int]:
        """Return the module that gives the result of call `source`, or of what that is an element-wise image of."""
        number = source
        while True:
            modules = [name for name in self.flow.given.get(number, []) if self.flow.runs[name] == 1]
            if modules:
                return modules[0], number
            sources = [s for s in self.nodes[number].sources if s >= 0 and self.origin[s]]
            if len(sources) != 1 or self._weighs(self.nodes[number]):
                raise StructureError(
                    f"group {self.name!r}: {self.nodes[source].name} in {self.nodes[source].module or 'the model'} is "
                    "added to the stream, but is no module's result; an index cannot be put behind it."
                )
            number = sources[0]

    def _start(self, module: str, source: int) -> str:
        """Return the first module of those that lead from the stream to `module` only: a norm goes with its reader."""
        first, number = module, source
        while number >= 0 and not self.joins[number] and number not in self.whole:
            node = self.nodes[number]
            own = node.module
            if node.parameters and self.flow.runs.get(own) == 1 and not self._reaches_join(number):
                first = own
            following = [s for s in node.sources if s >= 0 and self.origin[s]]
            if len(following) != 1:
                break
            number = following[0]
        return first

    def _reaches_join(self, number: int) -> bool:
        """Tell whether the result of a call is, unweighted, added to the stream."""
        todo, seen = [number], set()
        while todo:
            for reader in self.nodes[todo.pop()].readers:
                if reader in seen or (reader >= 0 and self._weighs(self.nodes[reader])):
                    continue
                seen.add(reader)
                if reader < 0 or self.joins[reader]:
                    return True
                todo.append(reader)
        return False
