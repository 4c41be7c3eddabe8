"""The network with removed channels zeroed instead: what a shrunk one must equal."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from convette.surgery._graph import ChannelGraph, Selection


@contextlib.contextmanager
def masked(model: nn.Module, graph: ChannelGraph, selection: Selection) -> Iterator[nn.Module]:
    """Zero the dropped units wherever `model` makes or reads them, for the length of a ``with`` block.

    ``with masked(model, graph, selection) as same: same(x)`` gives what the shrunk network gives (equal up to
    rounding, outside statistics over channels, see ``graph.scopes``). Yields `model` itself; afterwards its parameters
    hold their values again, bit for bit, unless they were trained meanwhile: entries that were not masked keep what
    they have become. `graph` must be a trace of this model or of one with the same structure.
    """
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    graph.check(selection)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with torch.no_grad():
            for name, kept in selection.items():
                group = graph[name]
                gone = torch.ones(group.size, dtype=torch.bool)
                gone[kept] = False
                for member in group.members:
                    tensor = tensors[member.parameter]
                    if not tensor.is_floating_point() or member.parameter.endswith("running_var"):
                        continue
                    index = member.index[gone].reshape(-1).to(tensor.device)
                    saved.append((tensor, member.dim, index, tensor.index_select(member.dim, index)))
                    tensor.index_fill_(member.dim, index, 0)
        yield model
    finally:
        with torch.no_grad():
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)
