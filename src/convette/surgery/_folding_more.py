"""Finding what `_fold_more` can fold: from the flow of one run, every find proved before it is kept."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.layers._watching import call, hooked
from convette.surgery._apply import apply, relative_error
from convette.surgery._calls import tensors_in
from convette.surgery._dataflow import Node, dataflow
from convette.surgery._edits import Edit, find_module
from convette.surgery._fold import _is_batch_norm
from convette.surgery._fold_layer import FoldLayer, description, plain_forms
from convette.surgery._fold_more import (
    METHODS,
    FoldConvs,
    FoldScale,
    Merge,
    Reparameterize,
    as_kernel,
    cannot_join,
    fused_form,
    is_plain_layer,
)
from convette.surgery._trace import evaluating
from convette.surgery._trial import in_double, trial_error

_ROUNDS = 20
_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
# What does nothing in eval mode.
_PASSING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "detach", "alpha_dropout", "clone")
_SUMS = ("add", "__add__", "__radd__", "__iadd__")


def reparameterize(model: nn.Module, example: Any, tolerance: float = 1e-5) -> list[Reparameterize]:
    """Put every block of `model` that knows its inference form into it, in place and logged; return the edits.

    Blocks with a method ``reparameterize``, ``switch_to_deploy`` or ``fuse`` are taken, the outermost first, where
    their copy gives the same on what they read in a run on `example` and has no more parameters.
    """
    done: list[Reparameterize] = []
    names = [name for name, module in model.named_modules() if name and _method(module)]
    seen = _calls(model, example, names)
    for name in names:
        if any(name.startswith(f"{edit.module}.") for edit in done):
            continue
        module = find_module(model, name)
        edit = Reparameterize(name, _method(module))
        try:
            fused = fused_form(module, edit.method)
            if _count(fused) <= _count(module) and _same(module, fused, seen.get(id(module), []), tolerance):
                apply(model, edit)
                done.append(edit)
        except StructureError:
            continue
    return done


def _method(module: nn.Module) -> str:
    return next((name for name in METHODS if callable(getattr(module, name, None))), "")


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def fold_layers(model: nn.Module, example: Any, tolerance: float = 1e-5) -> list[FoldLayer]:
    """Put the plain layer in the place of every layer of `model` that knows what it is at inference
    (`convette.layers.Foldable`), in place and logged; return the edits.

    A layer stays where it must (its ``folded()`` raises), or where its plain form does something else on what the
    layer reads in a run on `example` (relative error over `tolerance`, in double precision too).
    """
    forms = plain_forms(model)
    seen = _calls(model, example, list(forms))
    done = []
    for name, form in forms.items():
        module = find_module(model, name)
        edit = FoldLayer(name, *description(name, form))
        if _same(module, form, seen.get(id(module), []), tolerance) or _same_in_double(module, form, seen, tolerance):
            apply(model, edit)
            done.append(edit)
    return done


def _same_in_double(module: nn.Module, form: nn.Module, seen: Mapping[int, list[Any]], tolerance: float) -> bool:
    calls = [(in_double(args), in_double(kwargs)) for args, kwargs in seen.get(id(module), [])]
    return _same(copy.deepcopy(module).double(), copy.deepcopy(form).double(), calls, tolerance)


def _calls(model: nn.Module, example: Any, names: Sequence[str]) -> dict[int, list[tuple[Any, dict[str, Any]]]]:
    seen: dict[int, list[tuple[Any, dict[str, Any]]]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        clone = [item.clone() if isinstance(item, Tensor) else item for item in args]
        seen.setdefault(id(module), []).append((clone, kwargs))

    handles = [find_module(model, name).register_forward_pre_hook(note, with_kwargs=True) for name in names]
    if handles:
        with hooked(handles), evaluating(model):
            call(model, example)
    return seen


def _same(module: nn.Module, fused: nn.Module, calls: Sequence[tuple[Any, dict[str, Any]]], tolerance: float) -> bool:
    if not calls:
        return False
    for args, kwargs in calls:
        try:
            with evaluating(module), evaluating(fused):
                one = tensors_in([module(*[_copied(a) for a in args], **kwargs)], [])
                other = tensors_in([fused(*[_copied(a) for a in args], **kwargs)], [])
        except Exception:  # Whatever the fused block cannot do: it is left as it was.
            return False
        if [a.shape for a in one] != [b.shape for b in other]:
            return False
        if any(not relative_error(a, b) <= tolerance for a, b in zip(one, other, strict=True)):
            return False
    return True


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def fold_further(model: nn.Module, example: Any, tolerance: float = 1e-5) -> list[Edit]:
    """Fold scales, convolutions in a row and side by side of `model`, in place and logged; return the edits.

    Each round is proved on the example within the relative `tolerance`; a find that is not exact is left alone. Only
    folds that cost no more multiplications are made. Cost: about four runs of the network a round.
    """
    done: list[Edit] = []
    refused: set[Edit] = set()
    for _ in range(_ROUNDS):
        found = [edit for edit in further_folds(model, example) if edit not in refused]
        if not found:
            break
        good = found if _exact(model, found, example, tolerance) else []
        if not good:
            good = [edit for edit in found if _exact(model, [edit], example, tolerance)]
            refused.update(edit for edit in found if edit not in good)
        apply(model, *good)
        done += good
    return done


def _exact(model: nn.Module, edits: Sequence[Edit], example: Any, tolerance: float) -> bool:
    try:
        return trial_error(model, edits, example, tolerance) <= tolerance
    except StructureError:
        return False


def further_folds(model: nn.Module, example: Any) -> list[Edit]:
    """Return scales, pairs and parallel branches that one run on `example` shows can be folded, none touching
    another."""
    nodes = dataflow(model, example)
    times: dict[str, int] = {}
    for node in nodes:
        if node.name in (*_LAYERS, "batch_norm"):
            times[node.module] = times.get(node.module, 0) + 1
    own = {k: node for k, node in enumerate(nodes) if times.get(node.module) == 1 and _own_layer(model, node)}
    result: list[Edit] = []
    taken: set[str] = set()
    for edit in [*_merges(model, nodes, own), *_scales(model, nodes, own), *_pairs(model, nodes, own)]:
        names = {item for key, item in vars(edit).items() if isinstance(item, str)}
        names |= set(edit.branches) if isinstance(edit, Merge) else set()
        if not names & taken:
            taken |= names
            result.append(edit)
    return result


def _own_layer(model: nn.Module, node: Node) -> bool:
    """Tell whether a call is that of a plain layer on its own weights, or of a batch norm."""
    if node.name == "batch_norm":
        return _is_batch_norm(find_module(model, node.module))
    return (
        node.name in _LAYERS
        and f"{node.module}.weight" in node.parameters
        and is_plain_layer(find_module(model, node.module))
    )


def _followed(nodes: Sequence[Node], source: int) -> int:
    """Go back from call `source` through calls that pass on what they read; return the one reached if each result on
    the way is read once, else -1."""
    while source >= 0 and len(nodes[source].readers) == 1 and nodes[source].name in _PASSING:
        source = nodes[source].sources[0]
    return source if source >= 0 and len(nodes[source].readers) == 1 else -1


def _pairs(model: nn.Module, nodes: Sequence[Node], own: dict[int, Node]) -> list[Edit]:
    result: list[Edit] = []
    for node in own.values():
        start = node.sources[0] if node.sources else -1
        if start >= 0 and nodes[start].name == "pad" and nodes[start].module == node.module:
            start = nodes[start].sources[0]  # A convolution's own padding, other than with zeros.
        source = _followed(nodes, start)
        if node.name == "batch_norm" or source not in own or own[source].name != node.name:
            continue
        first, second = find_module(model, own[source].module), find_module(model, node.module)
        if not cannot_join(first, second) and _cheaper(first, second, own[source], node):
            result.append(FoldConvs(own[source].module, node.module))
    return result


def _cheaper(first: Any, second: Any, one: Node, other: Node) -> bool:
    """Tell whether the joint layer needs no more multiplications than the two."""
    if isinstance(first, nn.Linear):
        before, joint = first.weight.numel() + second.weight.numel(), first.in_features * second.out_features
        return joint <= before
    maps = (math.prod(one.shape[2:]), math.prod(other.shape[2:]))
    before = first.weight.numel() * maps[0] + second.weight.numel() * maps[1]
    taps = max(first.weight[0, 0].numel(), second.weight[0, 0].numel())
    return first.in_channels // first.groups * second.out_channels * taps * maps[1] <= before


def _scales(model: nn.Module, nodes: Sequence[Node], own: dict[int, Node]) -> list[Edit]:
    result: list[Edit] = []
    for node in nodes:
        if node.name not in ("mul", "__mul__", "__rmul__", "__imul__") or not node.module:
            continue
        module = find_module(model, node.module)
        held = list(module.parameters())
        # A module that does nothing but multiply what it reads by its one parameter.
        if len(held) != 1 or list(module.children()) or list(module.buffers()):
            continue
        for start in node.sources:
            source = _followed(nodes, start)
            if source in own and nodes[source].name != "batch_norm" and nodes[source].module != node.module:
                result.append(FoldScale(nodes[source].module, node.module))
                break
    return result


def _merges(model: nn.Module, nodes: Sequence[Node], own: dict[int, Node]) -> list[Edit]:
    result: list[Edit] = []
    for k, node in enumerate(nodes):
        if node.name not in _SUMS or (len(node.readers) == 1 and _is_sum(nodes, node.readers[0], node)):
            continue
        leaves = [leaf for leaf in _leaves(nodes, k) if leaf in own]
        by_source: dict[tuple[int, ...], list[str]] = {}
        for leaf in leaves:
            by_source.setdefault(_reads(nodes, own[leaf]), []).append(own[leaf].module)
        for names in by_source.values():
            edit = _merge(model, names)
            if edit is not None:
                result.append(edit)
    return result


def _reads(nodes: Sequence[Node], node: Node) -> tuple[int, ...]:
    return (-1, *node.constants[:1]) if node.sources[0] < 0 else (node.sources[0],)


def _is_sum(nodes: Sequence[Node], index: int, node: Node) -> bool:
    return index >= 0 and nodes[index].name in _SUMS and nodes[index].shape == node.shape


def _leaves(nodes: Sequence[Node], index: int) -> list[int]:
    """Return the calls whose results, read by nothing else, are summed up in call `index`."""
    result: list[int] = []
    for source in nodes[index].sources:
        if source < 0 or nodes[source].shape != nodes[index].shape:
            continue
        source = _followed(nodes, source)
        if source >= 0:
            result += _leaves(nodes, source) if nodes[source].name in _SUMS else [source]
    return result


def _merge(model: nn.Module, names: Sequence[str]) -> Merge | None:
    """Return the edit that merges as many of the layers `names`, which read the same, as fit into the largest."""
    best: Merge | None = None
    for into in names:
        layer = find_module(model, into)
        if not isinstance(layer, _ConvNd):
            continue
        branches = [
            name for name in names if name != into and not isinstance(as_kernel(layer, find_module(model, name)), str)
        ]
        if branches and (best is None or len(branches) > len(best.branches)):
            best = Merge(into, tuple(branches))
    return best
