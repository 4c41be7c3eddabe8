"""Leaving blocks out: in which order they are missed least, and how many may go."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convette.cost import count as count_costs
from convette.layers._watching import call, hooked, in_eval
from convette.pruning.criteria.feature_map_information import layer_information
from convette.pruning.layer_removal import macs_of, stage_ends
from convette.surgery import Remove, apply, removable, trace, untie


def allowance(network: nn.Module, example: Any, share: float | int) -> int:
    """Return how many blocks of `network` may go: `share` of those that can be left out, rounded down."""
    return int(share * len(removable(network, example)) + 1e-9)


def without_blocks(network: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """Return a copy of `network` without `blocks`; the network itself where there are none."""
    return drop_blocks(copy.deepcopy(network), blocks) if blocks else network


def drop_blocks(network: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """Leave `blocks` out of `network`, in place, logged as `Remove` edits."""
    for name in blocks:
        apply(network, Remove(name))
    return network


def untied(network: nn.Module, example: Any) -> nn.Module:
    """Un-tie the residual streams of `network`, in place, logged as an edit; `StructureError` where it has none."""
    apply(network, untie(trace(network, example)))
    return network


def least_missed(
    network: nn.Module, example: Any, count: int, loss: Callable[[nn.Module], float] | None = None
) -> tuple[str, ...]:
    """Return up to `count` blocks, the one that is missed least first, each chosen with those before it gone.

    `loss` says how bad a network is on calibration data. Without it a block counts by how little it changes what it
    reads on the example: ``|F(x) - x| / |x|``. Costs one call of `loss` (or one run) a block and choice.
    """

    def missed(here: nn.Module, names: Sequence[str]) -> Mapping[str, float]:
        if loss is None:
            return _changes(here, example, names)
        return {name: loss(without_blocks(here, [name])) for name in names}

    return _one_by_one(network, example, count, missed)


def least_informative(network: nn.Module, example: Any, count: int, batches: Sequence[Any]) -> tuple[str, ...]:
    """Return up to `count` blocks, the least informative a MAC first, each chosen with those before it gone.

    By `layer_information` on `batches` (images, labels); the first and the last block of every stage stay, as in
    `remove_layers`. Costs a forward pass a choice, and n^3 for n images a block and choice.
    """
    ends = stage_ends(network, example)

    def worth(here: nn.Module, names: Sequence[str]) -> Mapping[str, float]:
        cost = count_costs(here, example)
        return {name: r / max(1, macs_of(cost, name)) for name, r in layer_information(here, names, batches).items()}

    return _one_by_one(network, example, count, worth, spared=ends)


def _one_by_one(
    network: nn.Module,
    example: Any,
    count: int,
    price: Callable[[nn.Module, Sequence[str]], Mapping[str, float]],
    spared: Sequence[str] = (),
) -> tuple[str, ...]:
    chosen: list[str] = []
    for _ in range(count):
        here = without_blocks(network, chosen)
        names = [name for name in removable(here, example) if name not in chosen and name not in spared]
        if not names:
            break
        found = price(here, names)
        chosen.append(min(names, key=lambda name: found[name]))
    return tuple(chosen)


@torch.no_grad()
def _changes(network: nn.Module, example: Any, names: Sequence[str]) -> dict[str, float]:
    modules, found = dict(network.named_modules()), dict.fromkeys(names, float("inf"))

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and inputs and inputs[0].shape == output.shape:
                x, y = inputs[0].float(), output.float()
                found[name] = float((y - x).norm() / x.norm().clamp_min(1e-12))

        return hook

    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    with hooked(handles), in_eval(network):
        call(network, example)
    return found
