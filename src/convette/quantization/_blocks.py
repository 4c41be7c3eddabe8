"""The blocks of a network that learn alone, and running one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convette.layers._watching import hooked
from convette.surgery._converting import enclosing_block


@dataclass(frozen=True)
class Block:
    """A module that takes one tensor and gives one, with the quantised layers inside it."""

    name: str
    layers: tuple[str, ...]


@torch.no_grad()
def blocks_of(model: nn.Module, layers: Sequence[str], example: Tensor) -> list[Block]:
    """Return the blocks that hold `layers`: residual blocks and the like as one, other layers each for itself.

    What runs more than once, or takes or gives more than one tensor, is split into its layers, and a layer of that kind
    is left out: it then learns in the joint stage only.
    """
    wanted = {name: enclosing_block(model, name) or name for name in layers}
    names = list(dict.fromkeys([*wanted.values(), *layers]))
    calls: dict[str, int] = dict.fromkeys(names, 0)
    simple: dict[str, bool] = dict.fromkeys(names, True)
    handles = []
    for name in names:

        def seen(module: nn.Module, inputs: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls[name] += 1
            plain = len(inputs) == 1 and not kwargs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            simple[name] = simple[name] and plain

        handles.append(model.get_submodule(name).register_forward_hook(seen, with_kwargs=True))
    with hooked(handles):
        model(example)

    def fits(name: str) -> bool:
        return calls[name] == 1 and simple[name]

    found: dict[str, list[str]] = {}
    for layer in layers:
        name = wanted[layer] if fits(wanted[layer]) else layer
        if fits(name):
            found.setdefault(name, []).append(layer)
    return [Block(name, tuple(inside)) for name, inside in found.items()]


@torch.no_grad()
def run_block(model: nn.Module, name: str, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return what the module `name` takes and gives while `model` runs on `images`."""
    taken, given = [], []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # A copy: the next module may work in place.
        taken.append(inputs[0].clone())
        given.append(output.clone())

    with hooked([model.get_submodule(name).register_forward_hook(keep)]):
        for part in images.split(batch_size):
            model(part)
    return torch.cat(taken), torch.cat(given)


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Return the squared error as a share of the expected values' squares."""
    return (found - expected).square().sum() / expected.square().sum().clamp_min(1e-12)
