"""Absorbing: a batch norm taken in by the layer before it, where that layer says how (quadratic convolutions)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from convette.errors import ConvetteError, FileFormatError, StructureError
from convette.layers._watching import call, hooked
from convette.surgery._dataflow import dataflow
from convette.surgery._edits import Change, find_module
from convette.surgery._placing import place


@runtime_checkable
class Absorbs(Protocol):
    """A layer that can take in the batch norm behind it."""

    def absorb(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return the layer that does what this and the batch norm behind it do in eval mode."""
        ...


@dataclass(frozen=True)
class Absorb:
    """Let `layer` become what it and the batch norm `norm` behind it compute in eval mode: ``layer.absorb(norm)``."""

    layer: str
    norm: str
    kind: ClassVar[str] = "absorb"

    def apply(self, model: nn.Module) -> Change:
        """Replace both; raises `StructureError`, with the model unchanged, where the layer refuses."""
        layer, norm = find_module(model, self.layer), find_module(model, self.norm)
        if not isinstance(layer, Absorbs) or not isinstance(norm, nn.BatchNorm2d):
            raise StructureError(f"{type(layer).__name__} {self.layer!r} takes in no {type(norm).__name__}.")
        try:
            new = layer.absorb(norm)
        except ConvetteError as error:
            raise StructureError(f"{self.layer!r} cannot take in {self.norm!r}: {error}") from error
        change = Change()
        with change.all_or_nothing():
            place(model, self.layer, new.train(layer.training), change)
            place(model, self.norm, nn.Identity().train(norm.training), change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        return {"kind": self.kind, "layer": self.layer, "norm": self.norm}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Absorb":
        """Read the edit; raises `FileFormatError` where it names no layer or norm."""
        names = value.get("layer"), value.get("norm")
        if not all(isinstance(name, str) and name for name in names):
            raise FileFormatError("an 'absorb' edit must name a layer and a norm.")
        return Absorb(str(names[0]), str(names[1]))


def absorb_edits(model: nn.Module, example: Any) -> list[Absorb]:
    """Return the batch norms that the layers before them can take in: each runs once, and the norm is all that reads
    what the layer gives. Cost: a run of the network, where it has such a layer at all."""
    modules = dict(model.named_modules())
    if not any(isinstance(module, Absorbs) for module in modules.values()):
        return []
    nodes = dataflow(model, example)
    calls = [node.module for node in nodes if node.name == "batch_norm"]
    edits = []
    for index, node in enumerate(nodes):
        norm = modules.get(node.module)
        # Norms that do more than normalise (timm's with an activation) are subclasses.
        if node.name != "batch_norm" or type(norm) is not nn.BatchNorm2d or calls.count(node.module) > 1:
            continue
        source = nodes[node.sources[0]] if node.sources and node.sources[0] >= 0 else None
        if source is None or source.readers != [index] or not norm.track_running_stats:
            continue
        layer = modules.get(source.module)
        if isinstance(layer, Absorbs) and _runs_once(model, source.module, example):
            edits.append(Absorb(source.module, node.module))
    return edits


def _runs_once(model: nn.Module, name: str, example: Any) -> bool:
    from convette.surgery._trace import evaluating

    runs = 0

    def note(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = find_module(model, name).register_forward_hook(note)
    with hooked([handle]), evaluating(model):
        call(model, example)
    return runs == 1
