"""From a set of kept labels to the `Shrink` edit: parameters, module attributes, sizes written in Python."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.surgery._attributes import attributes_of, is_size, like, plain
from convette.surgery._calls import family
from convette.surgery._edits import Rewrite, Shrink, find_module
from convette.surgery._graph import ChannelGraph
from convette.surgery._records import SizeCall
from convette.surgery._sizes import Expectation, Mismatch, Probe

Attributes = dict[str, dict[str, Any]]
_ROUNDS = 6
# Sizes of space and of layout, never of channels, however equal their value.
_NOT_CHANNELS = ("stride", "kernel", "pad", "dilat", "window", "patch", "img", "grid", "shift", "depth", "input_size")


def shrink_edit(graph: ChannelGraph, keep: Tensor) -> Shrink:
    """Return the edit that leaves what `keep` (Bool, by root) says."""
    model = graph.model
    kept = _kept_indices(graph, keep)
    expectation = Expectation(graph.roots, keep)
    groups = _new_groups(graph, expectation)
    attributes, free = _static_attributes(model, kept, groups)
    edit = Shrink(kept, attributes, free)
    items = {}
    for item in [*graph.records.sizes, *graph.records.scalars.values()]:
        if _follows_from_class(model, item):
            continue
        sizes = expectation.sizes(item)
        if sizes is not None:
            items[item.call] = (item, sizes)
    needed = items or graph.records.unseen
    return _probed(graph, edit, items) if needed and edit.kept else edit


def _kept_indices(graph: ChannelGraph, keep: Tensor) -> dict[tuple[str, int], tuple[int, ...]]:
    result: dict[tuple[str, int], tuple[int, ...]] = {}
    slots = graph.slots()
    if not slots:
        return result
    stays = keep[graph.roots[torch.cat([slot.labels for slot in slots])]]
    # One tuple for equal lists: they are compared, written and turned into tensors once.
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    seen: dict[int, tuple[int, ...]] = {}
    for slot, stay in zip(slots, stays.split([len(slot.labels) for slot in slots]), strict=True):
        indices = seen.get(id(slot.labels))
        if indices is None:
            indices = tuple(stay.nonzero().view(-1).tolist())
            indices = seen[id(slot.labels)] = known.setdefault(indices, indices)
        if len(indices) < len(slot.labels):
            if not indices:
                raise StructureError(f"nothing would be left of {slot.parameter!r}.")
            result[slot.parameter, slot.dim] = indices
    return result


def _new_groups(graph: ChannelGraph, expectation: Expectation) -> dict[str, int]:
    """Return how many groups each grouped convolution or normalisation has left, by module."""
    result = {}
    for item in graph.records.sizes:
        if item.kind == "groups":
            sizes = expectation.sizes(item)
            if sizes is not None:
                result[item.module] = sizes[0][0]
    return result


def _follows_from_class(model: nn.Module, item: SizeCall) -> bool:
    """Tell whether the size in a call comes from an attribute that `attributes_of` sets."""
    if item.kind not in ("groups", "normalized_shape"):
        return False
    module = find_module(model, item.module)
    if item.kind == "groups":
        return isinstance(module, _ConvNd | nn.GroupNorm)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None


def _static_attributes(
    model: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]], groups: Mapping[str, int]
) -> tuple[Attributes, tuple[str, ...]]:
    touched: dict[str, dict[str, dict[int, int]]] = {}
    for (name, dim), indices in kept.items():
        owner, _, leaf = name.rpartition(".")
        touched.setdefault(owner, {}).setdefault(leaf, {})[dim] = len(indices)
    # A parameter shared by several modules is listed under one name; the others hold the same tensor.
    attributes: Attributes = {}
    free = []
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = _shared_owners(model, modules, touched)
    for owner, leaves in shared.items():
        module = modules[owner]
        shapes = {}
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                new = leaves.get(leaf, {})
                shapes[leaf] = tuple(new.get(dim, size) for dim, size in enumerate(tensor.shape))
        values = attributes_of(module, shapes, groups.get(owner))
        if isinstance(module, nn.MultiheadAttention):
            free.append(owner)
            packed = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
            if packed in leaves and 0 in leaves[packed]:
                rows = leaves[packed][0] // (3 if packed == "in_proj_weight" else 1)
                values["num_heads"] = rows // module.head_dim
        if values:
            attributes[owner] = values
    return attributes, tuple(free)


def _shared_owners(
    model: nn.Module, modules: Mapping[str, nn.Module], touched: dict[str, dict[str, dict[int, int]]]
) -> dict[str, dict[str, dict[int, int]]]:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    result: dict[str, dict[str, dict[int, int]]] = {}
    for owner, leaves in touched.items():
        module = modules[owner]
        for leaf, dims in leaves.items():
            tensor = getattr(module, leaf)
            full = f"{owner}.{leaf}" if owner else leaf
            for name in names.get(id(tensor), [full]):
                other, _, other_leaf = name.rpartition(".")
                result.setdefault(other, {})[other_leaf] = dims
    return result


# Sizes in Python ------------------------------------------------------------------------------------------------------


def _probed(graph: ChannelGraph, edit: Any, items: Mapping[int, tuple[SizeCall, Any]]) -> Any:
    """Run the shrunk network beside the trace; set the attributes that hold wrong sizes, rewrite what no attribute
    holds."""
    model = graph.model
    attributes: Attributes = {module: dict(values) for module, values in edit.attributes.items()}
    refused: set[tuple[str, str]] = set()
    rewrites: dict[tuple[str, str, int], Rewrite] = {}
    for attempt in range(_ROUNDS):
        trial = dataclasses.replace(edit, attributes=attributes, rewrites=tuple(rewrites.values()))
        mismatches, failure = _run(graph, trial, items)
        if failure is None and not mismatches:
            return trial
        if failure is not None:
            # A size that was set by guess may be what stops the network.
            guessed = {name for name in attributes if attributes[name].keys() - edit.attributes.get(name, {}).keys()}
            if not guessed:
                raise failure[1]
            _withdraw({failure[0]} & guessed or guessed, attributes, edit.attributes, refused)
        if attempt:
            # An attribute that did not put all of its module's calls right is left alone.
            _withdraw({item.item.module for item in mismatches}, attributes, edit.attributes, refused)
        now: dict[tuple[str, str, int], Any] = {}
        by_module: dict[str, list[Mismatch]] = {}
        for mismatch in mismatches:
            by_module.setdefault(mismatch.item.module, []).append(mismatch)
        for name, wrong in by_module.items():
            held = {} if attempt else _held_sizes(model, name, wrong, refused)
            for owner, key, value in held.values():
                attributes.setdefault(owner, {})[key] = value
            for mismatch in wrong:
                if attempt or not all(_literal_key(pair) in held for pair in mismatch.literals):
                    item = mismatch.item
                    place = (item.module, family(item.name), item.occurrence)
                    sizes: Any = mismatch.expected
                    if now.setdefault(place, sizes) != sizes:
                        raise StructureError(
                            f"{item.name} in {item.module or 'the model'} ({item.where}) would need other sizes each "
                            "time the module runs; keep those channels."
                        )
                    if place in rewrites and item.kind == "shape":
                        sizes = tuple(sorted({**dict(_pairs(rewrites[place])), **dict(sizes)}.items()))
                    rewrites[place] = Rewrite(*place, item.kind, sizes)
    if not mismatches:
        raise StructureError("the network does not run at its new width, whichever sizes are changed.")
    item = mismatches[0].item
    raise StructureError(
        f"{item.name} in {item.module or 'the model'} ({item.where}) holds a size that could not be changed."
    )


def _pairs(rewrite: Rewrite) -> Any:
    return rewrite.sizes


def _run(
    graph: ChannelGraph, trial: Any, items: Mapping[int, tuple[SizeCall, Any]]
) -> tuple[list[Mismatch], tuple[str, StructureError] | None]:
    """Run the edited network; return the wrong sizes found and, where it stopped, the module and the error."""
    from convette.surgery import _rules
    from convette.surgery._trace import call, evaluating, running_modules

    model = graph.model
    names = {id(module): name for name, module in model.named_modules()}
    probe = Probe(names, graph.records.calls, items, _rules.READS, frozenset(trial.free_heads))
    change = trial.apply(model)
    try:
        with evaluating(model), running_modules(probe), probe:
            call(model, graph.example)
    except StructureError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        name, line = probe.failed_in or ("", "?")
        text = f"the network does not run at its new width: {name or type(model).__name__} ({line}): {first}"
        return probe.mismatches, (name, StructureError(text))
    finally:
        change.revert()
    return probe.mismatches, None


def _literal_key(pair: tuple[Any, Any]) -> str:
    return repr(plain(pair[0]))


def _held_sizes(
    model: nn.Module, name: str, wrong: list[Mismatch], refused: set[tuple[str, str]]
) -> dict[str, tuple[str, str, Any]]:
    """Return, for each wrong literal, the attribute of the running module (or of one around it) that holds it."""
    wanted: dict[str, set[str]] = {}
    values: dict[str, tuple[Any, Any]] = {}
    whole: dict[str, tuple[str, str, Any]] = {}
    for mismatch in wrong:
        given, new = map(plain, mismatch.whole or ((), ()))
        found = _attribute_holding(model, name, given, new, refused) if given else None
        if found is not None:
            whole.update({_literal_key(pair): found for pair in mismatch.literals})
        for pair in mismatch.literals:
            if isinstance(pair[0], list) and isinstance(pair[1], list) and len(pair[0]) == len(pair[1]):
                for part in zip(*pair, strict=True):
                    wanted.setdefault(_literal_key(part), set()).add(repr(part[1]))
                    values[_literal_key(part)] = part
            wanted.setdefault(_literal_key(pair), set()).add(repr(plain(pair[1])))
            values[_literal_key(pair)] = pair
    result = {}
    for key, targets in wanted.items():
        if len(targets) > 1:
            continue
        given, new = values[key]
        found = _attribute_holding(model, name, plain(given), plain(new), refused)
        if found is not None:
            result[key] = found
    for mismatch in wrong:
        # A list whose every changed item is held somewhere is held.
        for pair in mismatch.literals:
            if isinstance(pair[0], list) and _literal_key(pair) not in result and isinstance(pair[1], list):
                parts = [part for part in zip(*pair, strict=False) if part[0] != part[1]]
                if len(pair[0]) == len(pair[1]) and all(_literal_key(part) in result for part in parts):
                    result[_literal_key(pair)] = result[_literal_key(parts[0])]
    return {**result, **whole}


def _attribute_holding(
    model: nn.Module, name: str, given: Any, new: Any, refused: set[tuple[str, str]]
) -> tuple[str, str, Any] | None:
    owner = name
    module = find_module(model, owner)
    for key, value in vars(module).items():
        if not is_size(value) or not _may_hold_channels(key) or (owner, key) in refused:
            continue
        if plain(value) == given and isinstance(new, int) == isinstance(value, int):
            return owner, key, like(new, value) if isinstance(value, int) else plain(new)
    # A product of an attribute with something that stays, such as batch times heads.
    if isinstance(given, int) and isinstance(new, int):
        for key, value in vars(module).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 2 or not _may_hold_channels(key):
                continue
            if (owner, key) not in refused and given >= value and given % value == 0 and new % (given // value) == 0:
                return owner, key, new // (given // value)
    return None


def _may_hold_channels(key: str) -> bool:
    return not key.startswith("_") and not any(word in key for word in _NOT_CHANNELS)


def _withdraw(
    names: set[str],
    attributes: Attributes,
    fixed: Mapping[str, Mapping[str, Any]],
    refused: set[tuple[str, str]],
) -> None:
    for name in names:
        for key in list(attributes.get(name, {})):
            if key not in fixed.get(name, {}):
                refused.add((name, key))
                del attributes[name][key]
        if not attributes.get(name):
            attributes.pop(name, None)
