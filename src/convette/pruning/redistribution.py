"""Least-squares repair: what is left of each layer's inputs takes over the weights of what goes (arXiv 2005.14070)."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.pruning._moments import Gathering, Layout, Moments, as_matrix, as_rows, as_weight, layout_of
from convette.pruning._units import tensors_of
from convette.pruning.criteria._observing import Reader, batches_of, find_readers, hooked, run, scoring
from convette.surgery import ChannelGraph


@dataclass(frozen=True)
class Repair:
    """What redistribution did to one layer: its mean squared output error as a share of the mean squared output.

    `plain` is the error of deleting alone, `repaired` with the weights taken over, both on the calibration data.
    """

    parameter: str
    plain: float
    repaired: float


def redistribute(
    model: nn.Module,
    graph: ChannelGraph,
    selection: Mapping[str, Tensor],
    calibration: Iterable[Any] | None,
    *,
    sequential: bool = False,
    constant: bool = True,
    spatial: str = "auto",
    ridge: float | int | None = 1e-5,
    rows: int = 4096,
) -> tuple[Repair, ...]:
    r"""Rewrite, in place, the weights that read dropped units, so that what stays stands in for what goes.

    .. math:: W'_S = W_S + \Delta, \qquad \Delta = \arg\min_\Delta E \lVert W x - (W_S + \Delta)\, y_S \rVert^2
        + \lambda \lVert \Delta \rVert^2

    for every convolution and linear layer (and attention's output projection) that reads a unit which is not in
    `selection`; S are the inputs that stay, x what the layer reads in the network as it is, y what it reads in the
    network at work, :math:`\lambda` = `ridge` times the mean second moment of y (None, as `prune` has it: 4 over the
    number of images, so that less moves the less they can say). The weights of dropped units become 0: call this before
    the cut, with the selection that will be cut. On the calibration data it is never worse than plain deletion, and
    exact, but for the ridge, where the dropped inputs are linear combinations of others.

    - `sequential`: layer by layer in the order in which they run, y read behind the layers repaired so far: each layer
      makes good for what came before, at the price of two partial runs a layer. By default y = x and one run does all.
    - `constant`: where a layer has a bias it takes over the mean of what goes.
    - `spatial`: "patches" treats every tap of a convolution as an input of its own (the true optimum), "channels" moves
      whole kernels (one factor for all taps, smaller matrices), "auto" the former up to 2304 columns.
    - `rows`: positions taken from each batch.

    Layers that cannot be solved (transposed convolutions, weights of other modules) are left to plain deletion.
    Returns a `Repair` a layer. Raises `UsageError` without calibration data. Costs one forward pass and a solve of
    n x n a layer. Source: Shah et al., Exploiting Non-Linear Redundancy for Neural Model Compression, arXiv 2005.14070.
    """
    if spatial not in ("auto", "patches", "channels"):
        raise UsageError(f"redistribution: spatial={spatial!r} is none of 'auto', 'patches', 'channels'.")
    graph.check(selection)
    batches = batches_of(calibration, "redistribution")
    ridge = float(4 / sum(len(labels) for _, labels in batches) if ridge is None else ridge)
    work = _layers(model, graph, selection, spatial)
    readers = {layer.parameter: [layer.reader] for layer in work}
    by_name = {layer.parameter: layer for layer in work}
    if not work:
        return ()
    if not sequential:
        gathering = Gathering({layer.parameter: layer.layout for layer in work}, rows, "redistribution")
        _gather(model, readers, batches, lambda name, value: gathering.note(name, by_name[name].module, value))
        # A layer that this data did not reach has nothing to go by.
        reached = [layer for layer in work if layer.parameter in gathering.moments]
        return tuple(_solve(layer, gathering.moments[layer.parameter], constant, ridge) for layer in reached)
    reference = copy.deepcopy(model)
    found = _order(model, readers, batches[:1])
    _silence(model, graph, selection, {layer.parameter for layer in work})
    repairs = []
    for name in found:
        moments = _compare(model, reference, by_name[name], batches, rows)
        if moments.rows:
            repairs.append(_solve(by_name[name], moments, constant, ridge))
    return tuple(repairs)


@dataclass(frozen=True)
class _Layer:
    parameter: str
    reader: Reader
    module: Any
    weight: Tensor
    bias: Tensor | None
    layout: Layout
    stays: Tensor  # bool, a column each


def _layers(model: nn.Module, graph: ChannelGraph, selection: Mapping[str, Tensor], spatial: str) -> list[_Layer]:
    """Return the layers that read something which goes, and which of their columns stay."""
    modules, tensors = dict(model.named_modules(remove_duplicate=False)), tensors_of(model)
    gone: dict[str, list[Tensor]] = {}
    for name, kept in selection.items():
        dropped = torch.ones(graph[name].size, dtype=torch.bool)
        dropped[kept] = False
        for member in graph[name].of("consumer"):
            if dropped.any():
                gone.setdefault(member.parameter, []).append(member.index[dropped].flatten())
    readers = {r.parameter: r for found in find_readers(model, graph).values() for r in found}
    layers = []
    for parameter, indices in gone.items():
        reader = readers.get(parameter)
        module: Any = modules.get(reader.module) if reader is not None else None
        if reader is None or reader.through == "output" or getattr(module, "transposed", False):
            continue
        weight = tensors[parameter]
        layout = layout_of(module, weight, spatial)
        stays = ~torch.isin(layout.channels, torch.cat(indices))
        owner = module.out_proj if reader.through == "heads" else module
        layers.append(_Layer(parameter, reader, module, weight, getattr(owner, "bias", None), layout, stays))
    return layers


def _gather(
    model: nn.Module, readers: dict[str, list[Reader]], batches: Sequence[Any], note: Callable[[str, Tensor], None]
) -> None:
    """Run the batches and call ``note(parameter, what its module reads)`` for every reader."""

    def take(watched: list[tuple[str, Reader]], value: Tensor) -> None:
        for name, _ in watched:
            note(name, value)

    with scoring(model), hooked(model, readers, take), torch.no_grad():
        for images, _ in batches:
            run(model, images)


class _Enough(Exception):
    """Ends a forward pass whose rest nobody needs."""


def _inputs(model: nn.Module, layer: _Layer, images: Any) -> list[Tensor]:
    """Return what `layer` reads; the forward pass stops there."""
    found: list[Tensor] = []

    def take(watched: list[tuple[str, Reader]], value: Tensor) -> None:
        found.append(value)
        raise _Enough

    watch = hooked(model, {layer.parameter: [layer.reader]}, take)
    with scoring(model), watch, torch.no_grad(), contextlib.suppress(_Enough):
        run(model, images)
    return found


def _order(model: nn.Module, readers: dict[str, list[Reader]], batches: Sequence[Any]) -> list[str]:
    """Return the readers' parameters in the order in which they run."""
    found: dict[str, None] = {}
    _gather(model, readers, batches, lambda name, value: found.setdefault(name))
    return list(found)


def _compare(model: nn.Module, reference: nn.Module, layer: _Layer, batches: Sequence[Any], rows: int) -> Moments:
    """Return the moments of what `layer` reads in `model` against what it reads in `reference`."""
    moments = Moments.zeros(layer.layout)
    for number, (images, _) in enumerate(batches):
        pairs = zip(_inputs(model, layer, images), _inputs(reference, layer, images), strict=True)
        for own, original in pairs:
            key = f"{layer.parameter}:{number}"
            moments.add(
                as_rows(layer.module, own, layer.layout, rows, key),
                as_rows(layer.module, original, layer.layout, rows, key),
                where=f"redistribution: {layer.parameter}",
            )
    return moments


def _silence(model: nn.Module, graph: ChannelGraph, selection: Mapping[str, Tensor], solved: set[str]) -> None:
    """Zero the dropped units wherever they are made; the weights in `solved` are still to be solved for."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, kept in selection.items():
            dropped = torch.ones(graph[name].size, dtype=torch.bool)
            dropped[kept] = False
            for member in graph[name].members:
                tensor = tensors[member.parameter]
                solvable = member.role == "consumer" and member.parameter in solved
                if tensor.is_floating_point() and not member.parameter.endswith("running_var") and not solvable:
                    tensor.index_fill_(member.dim, member.index[dropped].flatten().to(tensor.device), 0)


def _solve(layer: _Layer, moments: Moments, constant: bool, ridge: float) -> Repair:
    """Set the layer's weight to the best one on its remaining inputs; returns what that is worth."""
    stays, layout = layer.stays, layer.layout
    weight = as_matrix(layer.weight, layout).cpu()
    shift = constant and layer.bias is not None and (layout.kind == "patches" or not _padded(layer.module))
    own, cross = moments.own / moments.rows, moments.cross / moments.rows
    reference = moments.reference / moments.rows
    means = (moments.own_sum / moments.rows, moments.reference_sum / moments.rows)
    if shift:  # moments about the mean: the bias takes the rest
        own = own - means[0].unsqueeze(2) * means[0].unsqueeze(1)
        cross = cross - means[1].unsqueeze(2) * means[0].unsqueeze(1)
    inner, kept = own[:, stays][:, :, stays], weight[:, :, stays]
    wanted = weight @ cross[:, :, stays] - kept @ inner
    scale = inner.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30) if stays.any() else torch.ones(layout.parts)
    damped = inner + ridge * scale.view(-1, 1, 1) * torch.eye(inner.shape[1], dtype=inner.dtype)
    change = torch.linalg.solve(damped, wanted, left=False)
    before = _error(weight, kept, moments, stays, means, False)
    after = _error(weight, kept + change, moments, stays, means, shift)
    energy = float(((weight @ reference) * weight).sum())
    new = torch.zeros_like(weight)
    new[:, :, stays] = kept + change
    with torch.no_grad():
        layer.weight.copy_(as_weight(new, layout, layer.weight))
        if shift:
            moved = (weight @ means[1].unsqueeze(2) - (kept + change) @ means[0][:, stays].unsqueeze(2)).squeeze(2)
            if layout.kind == "channels" and layer.weight.ndim > 2:  # rows are (output, tap): the taps add up
                moved = moved.reshape(layer.weight.shape[0], -1).sum(dim=1)
            layer.bias.add_(moved.reshape(-1).to(layer.bias))  # type: ignore[union-attr]
    return Repair(layer.parameter, before / max(energy, 1e-30), after / max(energy, 1e-30))


def _padded(module: Any) -> bool:
    padding = getattr(module, "padding", 0)
    return isinstance(padding, str) or any(padding if isinstance(padding, tuple) else (padding,))


def _error(weight: Tensor, kept: Tensor, moments: Moments, stays: Tensor, means: Any, shift: bool) -> float:
    """Return the mean squared difference of ``weight x`` and ``kept y``, the mean taken out where `shift`."""
    reference, own = moments.reference / moments.rows, (moments.own / moments.rows)[:, stays][:, :, stays]
    cross = (moments.cross / moments.rows)[:, :, stays]
    total = ((weight @ reference) * weight).sum() + ((kept @ own) * kept).sum() - 2 * ((weight @ cross) * kept).sum()
    if shift:
        total = total - (weight @ means[1].unsqueeze(2) - kept @ means[0][:, stays].unsqueeze(2)).square().sum()
    return max(float(total), 0.0)
