"""Sizes written in Python: the edited network is run beside the record of the whole one, and what is wrong put right.

A size that an attribute of a module holds is set there; what no attribute holds is rewritten in the call itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from convette.errors import StructureError
from convette.surgery._attributes import is_size, like, plain
from convette.surgery._calls import family, raised_at
from convette.surgery._edits import Change, Rewrite, Shrink, find_module
from convette.surgery._graph import ChannelGraph
from convette.surgery._records import SizeCall
from convette.surgery._remembering import Remembered
from convette.surgery._sizes import Mismatch, Probe
from convette.surgery._walk import Kept, Walk
from convette.surgery._without_values import WithoutValues, without_values

Attributes = dict[str, dict[str, Any]]
_ROUNDS = 6
# Sizes of space and of layout, never of channels, however equal their value.
_SPACE = ("stride", "kernel", "pad", "dilat", "window", "patch", "img", "grid", "shift", "input_size")
_NOT_CHANNELS = (*_SPACE, "depth", "token")


def probed(graph: ChannelGraph, edit: Any, items: Mapping[int, tuple[SizeCall, Any]], walk: Walk | None = None) -> Any:
    """Run the shrunk network beside the trace; set the attributes that hold wrong sizes, rewrite what no attribute
    holds. `walk`: over the graph's model as it is."""
    model = graph.model
    attributes: Attributes = {module: dict(values) for module, values in edit.attributes.items()}
    refused: set[tuple[str, str]] = set()
    rewrites: dict[tuple[str, str, int], Rewrite] = {}
    stage = _Stage(graph, items, walk or Walk(model))
    remembered = vars(graph).get("_remembered") if isinstance(edit, Shrink) else None
    if remembered is not None:
        trial = remembered.put_right(edit, items, stage.walk)
        if trial is not None and stage.run(trial) == ([], None):
            return trial
    learned = Remembered()
    for attempt in range(_ROUNDS):
        trial = dataclasses.replace(edit, attributes=attributes, rewrites=tuple(rewrites.values()))
        mismatches, failure = stage.run(trial)
        if failure is None and not mismatches:
            if attempt and isinstance(edit, Shrink):
                vars(graph)["_remembered"] = learned.of(trial, edit, items)
            return trial
        if failure is not None:
            # A size that was set by guess may be what stops the network.
            guessed = {name for name in attributes if attributes[name].keys() - edit.attributes.get(name, {}).keys()}
            if not guessed:
                raise failure[1]
            _withdraw(_alike(model, {failure[0]}, guessed) or guessed, attributes, edit.attributes, refused)
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
                learned.note(mismatch, {_literal_key(pair): held.get(_literal_key(pair)) for pair in mismatch.literals})
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


class _Stage:
    """Where edits are tried: they are taken back after each run, and so is what the run left on the modules."""

    def __init__(self, graph: ChannelGraph, items: Mapping[int, tuple[SizeCall, Any]], walk: Walk) -> None:
        self.graph, self.items, self.walk = graph, items, walk
        self.kept = Kept(walk)
        self.bare, self.device = None, None
        if not graph.records.needed:
            self.bare, self.device = without_values(graph.example)

    def run(self, trial: Any) -> tuple[list[Mismatch], tuple[str, StructureError] | None]:
        """Run the edited network; return the wrong sizes found and, where it stopped, the module and the error."""
        from convette.surgery._rules import READS, table

        if self.device is not None and isinstance(trial, Shrink):
            values = WithoutValues(self.device, table(), READS)
            drawn = torch.get_rng_state()
            try:
                found, failure = self._attempt(
                    trial, lambda model: trial.apply_shapes(model, self.walk), self.bare, values
                )
                if failure is None and values.reason is None:
                    return found, None
            except StructureError:
                pass  # Said again, of the real run, below.
            torch.set_rng_state(drawn)
        return self._attempt(trial, trial.apply, self.graph.example, None)

    def _attempt(
        self, trial: Any, apply: Callable[[nn.Module], Change], example: Any, values: WithoutValues | None
    ) -> tuple[list[Mismatch], tuple[str, StructureError] | None]:
        from convette.layers._watching import call
        from convette.surgery._rules import READS
        from convette.surgery._trace import evaluating, running_modules

        model = self.graph.model
        heads = frozenset(trial.free_heads)
        probe = Probe(self.walk.names, self.graph.records.calls, self.items, READS, heads, values)
        change = apply(model)
        try:
            with evaluating(model, self.walk.modules), running_modules(probe), probe:
                call(model, example)
        except StructureError:
            raise
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            name, line = probe.failed_in or ("", raised_at(error))
            text = f"the network does not run at its new width: {name or type(model).__name__} ({line}): {first}"
            return probe.mismatches, (name, StructureError(text))
        finally:
            change.revert()
            self.kept.restore()
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


def _alike(model: nn.Module, names: set[str], among: set[str]) -> set[str]:
    """Return those of the modules `among` that are of the class of one of `names`: what is wrong in one is in all."""
    kinds = {type(find_module(model, name)) for name in names & among}
    return {name for name in among if type(find_module(model, name)) in kinds}


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
