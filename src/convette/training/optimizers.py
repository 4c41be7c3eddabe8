"""Optimisers with sensible parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convette.errors import FileFormatError
from convette.training.settings import TrainSettings


@dataclass(frozen=True)
class WarmupCosine:
    r"""Learning rate factor at step t of T, with W steps of linear warm-up and the final fraction f.

    .. math:: (t + 1) / (W + 1) \text{ for } t < W, \text{ else }
              f + (1 - f) \tfrac12 \bigl(1 + \cos \pi \tfrac{t - W}{T - W}\bigr)

    Source of the cosine: Loshchilov and Hutter, arXiv 1608.03983, without restarts.
    """

    total: int
    warmup: int = 0
    final: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the factor for step number `step` (0 is the first)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        part = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part))


def schedule_for(settings: TrainSettings, steps_per_epoch: int) -> WarmupCosine:
    """Return the schedule `settings` describe for epochs of `steps_per_epoch` optimiser steps."""
    total = settings.epochs * steps_per_epoch
    epochs = settings.warmup_epochs if settings.warmup_epochs is not None else min(5.0, settings.epochs / 10)
    return WarmupCosine(total, min(round(epochs * steps_per_epoch), total - 1), float(settings.final_fraction))


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: weights with `weight_decay`, and biases, norms and other vectors without."""
    decayed, plain, seen = [], [], set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            vector = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            (plain if vector else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    modules: Iterable[nn.Module], settings: TrainSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimiser of `settings` over all trainable parameters of `modules`, its rate being `learning_rate`."""
    groups = parameter_groups(modules, float(settings.weight_decay))
    if settings.optimizer == "sgd":
        momentum = float(settings.momentum)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(float(settings.momentum), 0.999))


def exchange_parameters(
    optimizer: torch.optim.Optimizer, old: Iterable[nn.Parameter], new: Iterable[nn.Parameter]
) -> None:
    """Let `optimizer` forget the parameters `old` and train `new`, with weight decay for matrices and filters only."""
    gone = {id(parameter) for parameter in old}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]
    for parameter in new:
        fitting = [g for g in optimizer.param_groups if (g["weight_decay"] > 0) == (parameter.ndim > 1)]
        (fitting or optimizer.param_groups)[0]["params"].append(parameter)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the state of `optimizer` keyed by parameter name; `names` maps ``id(parameter)`` to it.

    Names, unlike torch's running numbers, survive edits of the structure.
    """
    groups = [
        {
            "names": [names[id(parameter)] for parameter in group["params"]],
            "options": {key: _plain(value) for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "state": {names[id(p)]: dict(values) for p, values in optimizer.state.items()}}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Put back what `optimizer_state` returned; `parameters` maps names to the parameters of now."""
    for name in (name for group in state["groups"] for name in group["names"]):
        if name not in parameters:
            raise FileFormatError(f"the checkpoint's optimiser knows a parameter {name!r} that the network lacks.")
    optimizer.param_groups[:] = [
        {"params": [parameters[name] for name in group["names"]], **_options(group["options"])}
        for group in state["groups"]
    ]
    optimizer.state.clear()
    for name, values in state["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in values.items()}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value  # counters stay where the optimiser made them: on the CPU
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
