"""Checks that stop a training before it goes on wrongly: parameters swapped unseen, ranks apart, values not finite."""

import torch
from torch import Tensor, nn

from convette.errors import StructureError, TrainingError
from convette.layers._watching import hooked
from convette.training.distributed import gather, world_size


class ParameterGuard:
    """Remembers which parameters the wrapper was set up with and refuses to go on with others.

    An edit of the network underneath a live DDP wrapper or optimiser raises nothing by itself: new parameters are then
    neither synchronised nor trained. One walk over the modules a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = _identities(model)

    def check(self, model: nn.Module) -> None:
        """Raise `StructureError` if a parameter of `model` was added, removed, replaced or resized since."""
        if _identities(model) != self._known:
            raise StructureError(
                "the network's parameters were changed under a live optimiser; "
                "edit it through trainer.edit_structure(edits) instead."
            )


def _identities(model: nn.Module) -> list[tuple[int, torch.Size]]:
    # By hand instead of named_parameters: this runs before every step.
    found, stack = [], [model]
    while stack:
        module = stack.pop()
        found.extend((id(p), p.shape) for p in module._parameters.values() if p is not None)
        stack.extend(child for child in module._modules.values() if child is not None)
    return found


@torch.no_grad()
def check_ranks_agree(model: nn.Module, when: str) -> None:
    """Raise `TrainingError` naming the first parameter whose bits differ between ranks."""
    if world_size() == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    sums = checksums(model)
    for rank, (their_names, their_sums) in enumerate(gather((names, sums))):
        for name, ours, theirs in zip(names, sums, their_sums, strict=False):
            if ours != theirs or their_names != names:
                raise TrainingError(f"{when}: parameter {name!r} differs between this rank and rank {rank}.")


def checksums(model: nn.Module) -> list[int]:
    """Return one number for each parameter of `model`, which changes when any bit of it does."""
    return [int(total) for total in torch.stack([_bit_sum(parameter) for parameter in model.parameters()]).tolist()]


def _bit_sum(parameter: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = parameter.detach().flatten().view(integers).to(torch.int64)
    return (bits * (torch.arange(len(bits), device=bits.device) % 8191 + 1)).sum()


def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer with a value that is not finite; None if all are."""
    named = [("parameter", name, p) for name, p in model.named_parameters()]
    named += [("buffer", name, b) for name, b in model.named_buffers()]
    tensors = [tensor for _, _, tensor in named if tensor.is_floating_point()]
    if not tensors or bool(torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all()):
        return None
    for kind, name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            return f"{kind} {name!r}"
    return None


@torch.no_grad()
def blame(model: nn.Module, images: Tensor) -> str:
    """Say where values stop being finite: in the weights, in the input, or in the output of a module."""
    culprit = first_not_finite(model)
    if culprit is not None:
        return culprit
    if not bool(torch.isfinite(images).all()):
        return "the input images"
    found: list[str] = []
    handles = [
        module.register_forward_hook(_watch(name or "the network", found)) for name, module in model.named_modules()
    ]
    with hooked(handles):
        model(images)
    return f"the output of module {found[0]!r}" if found else "none inside the network (the loss itself)"


def _watch(name: str, found: list[str]):
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return hook
