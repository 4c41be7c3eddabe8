"""A factor on every residual branch, and the training that pushes factors and batch-norm scales to exact zeros."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.errors import StructureError, UsageError
from convette.layers._watching import call, hooked, in_eval
from convette.surgery import removable
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer


def branch_norms(model: nn.Module, example: Any) -> dict[str, str]:
    """Return for every block that can be left out the batch norm at the end of its branch: the last it runs.

    Blocks without a batch norm are left out of the answer. Cost: two runs of the network.
    """
    blocks, modules = removable(model, example), dict(model.named_modules())
    found: dict[str, str] = {}
    names = {id(module): name for name, module in modules.items()}

    def note(module: nn.Module, inputs: Any) -> None:
        name = names[id(module)]
        for block in blocks:
            if name.startswith(f"{block}."):
                found[block] = name

    norms = [module for module in modules.values() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    with hooked(handles), in_eval(model), torch.no_grad():
        call(model, example)
    return {block: found[block] for block in blocks if block in found}


def soft_threshold(x: Tensor, by: float) -> Tensor:
    r"""Return :math:`\mathrm{sgn}(x) \max(|x| - by, 0)`: the proximal step of an L1 norm, with exact zeros."""
    return x.sign() * (x.abs() - by).clamp_min(0)


class _Factors(nn.Module):
    """One scalar a branch, from 1."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(count))


class SparseFactors(Method):
    r"""Train ``y = x + lambda_b F_b(x)`` for every residual block, and push lambdas and batch-norm scales to zero.

    .. math:: L = L_{task} + a \sum_b |\lambda_b| + s \sum |\gamma|

    by a soft threshold of ``rate * a`` and ``rate * s`` after each step (exact zeros), neither under weight decay. A
    factor multiplies what the last batch norm of its branch puts out, and folds into it exactly, whatever its sign
    (`fold_factors`; at the end of the training this is done). Factors are in `factors` by block. `decay_at`: from this
    share of the training s is a tenth. Costs one multiplication a branch. Raises `StructureError` for a network
    without such blocks, `UsageError` for strengths below 0.
    """

    name = "sparse_factors"
    events = frozenset({Event.SETUP, Event.STAGE_START, Event.AFTER_OPTIMIZER_STEP, Event.FIT_END, Event.AFTER_LOAD})

    def __init__(self, block_strength: float = 5e-3, scale_strength: float = 5e-4, *, decay_at: float = 0.7) -> None:
        if block_strength < 0 or scale_strength < 0:
            raise UsageError(f"{self.name}: strengths {block_strength} and {scale_strength} must be at least 0.")
        self.block_strength, self.scale_strength, self.decay_at = block_strength, scale_strength, decay_at
        self.factors: dict[str, float] = {}
        self._norms: dict[str, str] = {}

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Attach the factors, shrink them after each step, fold them in the end."""
        state = trainer.state
        if event is Event.SETUP:
            self._attach(trainer)
        elif event is Event.STAGE_START:
            for group in state.optimizers["main"].param_groups:
                group["params"] = list(group["params"])
            self._without_decay(trainer)
        elif event is Event.AFTER_OPTIMIZER_STEP:
            self._shrink(trainer)
        elif event is Event.FIT_END:
            values = state.auxiliary[self.name].values.detach()  # type: ignore[union-attr]
            self.factors = {block: float(value) for block, value in zip(self._norms, values, strict=True)}
            trainer.resources.close()  # hooks off, before the factors go into the norms
            fold_factors(state.model, {self._norms[block]: value for block, value in self.factors.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the factors once they are folded."""
        return {"factors": self.factors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.factors = dict(state["factors"])

    def _attach(self, trainer: "Trainer") -> None:
        model = trainer.state.model
        example = trainer.state.example[0] if isinstance(trainer.state.example, tuple) else trainer.state.example
        self._norms = branch_norms(model, example)
        if not self._norms:
            raise StructureError(f"{self.name}: the network has no residual block that can be left out.")
        made = trainer.add_auxiliary(self.name, _Factors(len(self._norms)))
        modules = dict(model.named_modules())
        for number, norm in enumerate(self._norms.values()):

            def scale(module: nn.Module, inputs: Any, output: Tensor, number: int = number) -> Tensor:
                return output * made.values[number]  # type: ignore[index]

            trainer.resources.callback(modules[norm].register_forward_hook(scale).remove)

    def _without_decay(self, trainer: "Trainer") -> None:
        from convette.training.methods._groups import split_group

        scales = [m.weight for m in trainer.state.model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
        split_group(trainer.state.optimizers["main"], [*scales, *trainer.state.auxiliary.parameters()], self.name)

    @torch.no_grad()
    def _shrink(self, trainer: "Trainer") -> None:
        state = trainer.state
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        later = 0.1 if state.clock.step >= self.decay_at * total else 1.0
        rate = state.learning_rate
        values: Tensor = state.auxiliary[self.name].values  # type: ignore[assignment]
        values.copy_(soft_threshold(values, rate * self.block_strength))
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.copy_(soft_threshold(module.weight, rate * self.scale_strength * later))


@torch.no_grad()
def fold_factors(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply scale and shift of the batch norms named by their factors, in place: ``lambda * norm(x)``, exactly."""
    modules = dict(model.named_modules())
    for name, value in factors.items():
        norm = modules.get(name)
        if not isinstance(norm, nn.BatchNorm2d) or not norm.affine:
            raise StructureError(f"{name!r} is no batch norm with a scale and a shift; a factor cannot go into it.")
        norm.weight.mul_(value)
        norm.bias.mul_(value)
