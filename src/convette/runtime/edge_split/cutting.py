"""Cutting a network in two where one tensor crosses, on its exported graph: head and tail compute the very same."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from convette.errors import ConvetteError, StructureError, did_you_mean
from convette.layers._watching import in_eval
from convette.runtime import _vendors


@dataclass(frozen=True)
class CutPoint:
    """A place where one tensor crosses: behind module `name`; its `shape` for one image, `bytes` in 8 bits."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Cut:
    """`head(images)` gives the tensor that crosses, `tail(tensor)` the outputs."""

    head: nn.Module
    tail: nn.Module
    point: CutPoint


def cut_points(model: nn.Module, example: Tensor) -> tuple[CutPoint, ...]:
    """Return the places where `model` can be cut, in the order of its run, with what crosses there for one image.

    Raises `ConvetteError` where the network cannot be captured.
    """
    graph = _captured(model, example)
    return tuple(point for point, _ in _points(graph))


def cut(model: nn.Module, example: Tensor, at: str) -> Cut:
    """Return head and tail of `model` (eval mode, weights shared), cut behind the module called `at`.

    ``tail(head(x))`` equals ``model(x)`` bit for bit, for any batch size. Raises `StructureError` where more than one
    tensor crosses there, with the nearest place that can be.
    """
    graph = _captured(model, example)
    known = {point.name: (point, node) for point, node in _points(graph)}
    if at not in known:
        raise StructureError(f"{type(model).__name__} cannot be cut behind {at!r}.{did_you_mean(at, known)}")
    point, node = known[at]
    before = _needed(node)
    head, tail = fx.Graph(), fx.Graph()
    _copy(graph, head, lambda n: n in before, {})
    crossing = tail.placeholder("crossing")
    values = {node: crossing}
    _copy(graph, tail, lambda n: n not in before or n.op == "get_attr", values)
    made: dict[fx.Node, fx.Node] = dict(zip(_kept(graph, before), head.nodes, strict=True))
    head.output(made[node])
    return Cut(_module(graph, head), _module(graph, tail), point)


def _captured(model: nn.Module, example: Tensor) -> fx.GraphModule:
    example = torch.cat([example, example])[:2].float()
    try:
        with in_eval(model), _vendors.quiet(), torch.no_grad():
            batch = {0: torch.export.Dim.DYNAMIC}
            program = torch.export.export(model, (example,), dynamic_shapes=(batch,), strict=False)
        return program.module()  # type: ignore[return-value]
    except Exception as error:
        raise ConvetteError(f"{type(model).__name__} cannot be cut: {_vendors.one_line(error)}.") from error


def _points(graph: fx.GraphModule) -> list[tuple[CutPoint, fx.Node]]:
    """The nodes behind which nothing else computed is still needed, named by the module that ends there."""
    nodes = [node for node in graph.graph.nodes if node.op not in ("get_attr", "output") and not _is_guard(node)]
    last = {node: i for i, node in enumerate(nodes)}
    until = {
        node: max((last.get(user, len(nodes)) for user in node.users if not _is_guard(user)), default=-1)
        for node in nodes
    }
    found: dict[str, tuple[CutPoint, fx.Node]] = {}
    for index, node in enumerate(nodes[:-1]):
        alive = [other for other in nodes[: index + 1] if until[other] > index and _is_tensor(other)]
        sizes = [other for other in nodes[: index + 1] if until[other] > index and not _is_tensor(other)]
        if alive != [node] or sizes or node.op == "placeholder":
            continue
        value = node.meta["val"]
        shape = tuple(int(side) for side in value.shape[1:])
        if not value.is_floating_point():
            continue
        count = 1
        for side in shape:
            count *= side
        for name in _ending(nodes, index):
            found[name] = (CutPoint(name, shape, count), node)
    return sorted(found.values(), key=lambda pair: last[pair[1]])


def _ending(nodes: list[fx.Node], index: int) -> list[str]:
    """The modules whose last operation is node `index`."""
    here = _stack(nodes[index])
    after = set().union(*(_stack(node) for node in nodes[index + 1 :])) if index + 1 < len(nodes) else set()
    return [name for name in sorted(here) if name and name not in after]


def _stack(node: fx.Node) -> set[str]:
    # Entries are (path of the module, its class); the root's path is empty.
    stack = node.meta.get("nn_module_stack") or {}
    return {str(entry[0]).removeprefix("L['self'].") for entry in stack.values()}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_guard(node: fx.Node) -> bool:
    return node.op == "call_module" and "guard" in str(node.target)


def _needed(node: fx.Node) -> set[fx.Node]:
    found, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def _kept(graph: fx.GraphModule, wanted: set[fx.Node]) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if _wanted(node, lambda n: n in wanted)]


def _wanted(node: fx.Node, wanted: Any) -> bool:
    return (node.op == "placeholder" or wanted(node)) and node.op != "output" and not _is_guard(node)


def _copy(graph: fx.GraphModule, target: fx.Graph, wanted: Any, values: dict[fx.Node, fx.Node]) -> None:
    is_tail = bool(values)
    for node in graph.graph.nodes:
        if node.op == "output":
            if is_tail:
                target.output(fx.map_arg(node.args[0], lambda n: values[n]))
            continue
        if node in values or _is_guard(node) or (is_tail and node.op == "placeholder"):
            continue
        if not is_tail and not _wanted(node, wanted):
            continue
        if is_tail and not wanted(node):
            continue
        values[node] = target.node_copy(node, lambda n: values[n])


class _Outputs(nn.Module):
    """An exported graph gives a tuple of one; callers want the tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found[0] if isinstance(found, tuple | list) else found


def _module(root: fx.GraphModule, graph: fx.Graph) -> nn.Module:
    # Attributes that neither half reads are left out.
    for node in list(reversed(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    made = fx.GraphModule(root, graph)
    return _Outputs(made).requires_grad_(False)
