"""Annealing of linear redundancy: units fade into what predicts them while training goes on, then go without loss.

Exploiting Non-Linear Redundancy for Neural Model Compression, Shah, Olivier and Raj, ICPR 2020, arXiv 2005.14070. That
networks are annealed is the paper's; the curve, the refreshed least squares and what convolutions do are ours.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.cost import Budget
from convette.data import ImageData
from convette.errors import UsageError
from convette.pruning._calibration import draw_calibration
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._moments import Gathering, Layout
from convette.pruning._units import tensors_of
from convette.pruning.criteria._observing import Reader, find_readers, hooked, run, scoring
from convette.pruning.methods.gradual_pruning import GradualPruning, one_image
from convette.surgery import ChannelGraph, trace
from convette.training import Event

if TYPE_CHECKING:
    from convette.training import Trainer


class AnnealedRedundancy(GradualPruning):
    r"""Choose once what goes, fade it into the best linear prediction by what stays, cut it when nothing of it is left.

    .. math:: \tilde z_j = (1 - a_t)\, z_j + a_t \sum_{i \in K} \alpha_{ij} z_i, \qquad
        a_t = \tfrac12 \bigl(1 - \cos \pi \tfrac{t - t_0}{t_1 - t_0}\bigr)

    in what every convolution and linear layer reads between the shares `begin` and `end` of the training; K are the
    units that `criterion` and `allocation` keep at `begin`, :math:`\alpha` the least squares on the calibration images,
    taken anew `times` times meanwhile. At `end` the coefficients go into the readers' weights,

    .. math:: W_i \leftarrow W_i + \sum_j \alpha_{ij} W_j,

    and the units are cut: the outputs stay as they are, padding included. Units read by grouped or transposed
    convolutions or by attention are only cut.

    Args as `GradualPruning`; `ridge`: of the least squares, times the mean second moment. Calibration images are always
    needed. Costs a product a reader and step, a pass over the calibration images each of `times`; nothing at inference.
    Raises what `GradualPruning` raises.
    """

    name = "annealed_redundancy"
    events = frozenset({Event.BATCH_START})

    def __init__(
        self,
        budget: Budget | str,
        *,
        criterion: str = "linear_redundancy",
        criterion_options: Mapping[str, Any] | None = None,
        allocation: str = "global",
        allocation_options: Mapping[str, Any] | None = None,
        begin: float | int = 0.1,
        end: float | int = 0.7,
        times: int = 4,
        ridge: float | int = 1e-2,
        multiple_of: int = 1,
        min_fraction: float | int = 0.1,
        constraints: str = "",
        calibration_images: int = 256,
        calibration: Any = (),
        data: ImageData | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            budget,
            criterion=criterion,
            criterion_options=criterion_options,
            allocation=allocation,
            allocation_options=allocation_options,
            begin=begin,
            end=end,
            times=1,
            multiple_of=multiple_of,
            min_fraction=min_fraction,
            constraints=constraints,
            calibration_images=calibration_images,
            calibration=calibration,
            data=data,
            seed=seed,
        )
        if not self.calibration and data is None:
            raise UsageError(f"{self.name} needs calibration batches, or data to draw them from.")
        if times < 1 or not ridge > 0 or not begin < end:
            raise UsageError(
                f"{self.name}: times={times} and ridge={ridge} must be above 0, begin={begin} below {end}."
            )
        self.refreshes, self.ridge = times, float(ridge)
        self.share = 0.0
        self.refreshed = 0
        self.selection: dict[str, list[int]] | None = None
        self.alphas: dict[str, Tensor] = {}
        self._faded: dict[str, tuple[Reader, Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Choose at `begin`, fade, refresh, cut at `end`."""
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        first, last = round(self.begin * total), min(round(self.end * total), total - 1)
        step = trainer.state.clock.step
        if self.cuts == 2 or step < first:
            return
        if self.selection is None:
            self.cuts = 1
            graph = trace(trainer.state.model, one_image(trainer.state.example))
            self.selection = decided_by_main_rank(lambda: self.choose(trainer, graph))
        if not self._handles and self.selection:
            self._hang(trainer)
        linear = min(1.0, (step - first) / max(1, last - first))
        if self.refreshed < self.refreshes and self.refreshed <= linear * self.refreshes:
            self._refresh(trainer)
        self.share = 0.5 * (1 - math.cos(math.pi * linear))
        if step >= last:
            self.cuts = 2
            self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the choice and the coefficients as well."""
        own = {"selection": self.selection, "alphas": self.alphas, "refreshed": self.refreshed, "share": self.share}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state)
        chosen = state["selection"]
        self.selection = None if chosen is None else {name: [int(u) for u in kept] for name, kept in chosen.items()}
        self.alphas, self.refreshed = dict(state["alphas"]), int(state["refreshed"])
        self.share = float(state["share"])

    def _hang(self, trainer: "Trainer") -> None:
        model = trainer.state.model
        graph = trace(model, one_image(trainer.state.example))
        self._faded = fading(model, graph, self.selection or {})
        averaged = [trainer.state.ema.module] if trainer.state.ema is not None else []
        for network in (model, *averaged):
            for name, (reader, kept, gone) in self._faded.items():
                hook = self._hook(name, reader, kept, gone)
                self._handles.append(network.get_submodule(reader.module).register_forward_pre_hook(hook))
        trainer.resources.callback(self._let_go)

    def _hook(self, name: str, reader: Reader, kept: Tensor, gone: Tensor) -> Any:
        def fade(module: nn.Module, args: tuple[Any, ...]) -> Any:
            alpha = self.alphas.get(name)
            if alpha is None or not self.share:
                return None
            value = args[0].movedim(reader.axis, -1)
            stays, goes = kept.to(value.device), gone.to(value.device)
            predicted = value[..., stays] @ alpha.to(value.device, value.dtype)
            value = value.index_copy(-1, goes, torch.lerp(value[..., goes], predicted, self.share))
            return (value.movedim(-1, reader.axis), *args[1:])

        return fade

    def _refresh(self, trainer: "Trainer") -> None:
        """Take the coefficients anew, from what readers would read if nothing faded."""
        self.refreshed += 1
        if not self.calibration and self.data is not None:
            self.calibration = draw_calibration(
                self.data, self.calibration_images, seed=self.seed, device=trainer.state.device
            )
        self._let_go()
        self.alphas = predictors(trainer.state.model, self._faded, self.calibration, self.ridge)
        self._hang(trainer)

    def _finish(self, trainer: "Trainer") -> None:
        self._let_go()
        averaged = [trainer.state.ema.module] if trainer.state.ema is not None else []
        for network in (trainer.state.model, *averaged):
            move(network, self._faded, self.alphas)
        kept = {name: torch.tensor(units) for name, units in (self.selection or {}).items()}
        if kept:
            graph = trace(trainer.state.model, one_image(trainer.state.example))
            trainer.edit_structure([graph.shrink(kept)])

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


Faded = Mapping[str, tuple[Reader, Tensor, Tensor]]


def fading(
    model: nn.Module, graph: ChannelGraph, selection: Mapping[str, list[int]]
) -> dict[str, tuple[Reader, Tensor, Tensor]]:
    """Return by weight the readers that can predict what `selection` drops, with the channels that stay and that go."""
    modules, gone = dict(model.named_modules()), dict[str, list[Tensor]]()
    readers: dict[str, Reader] = {}
    for name, found in find_readers(model, graph).items():
        dropped = torch.ones(graph[name].size, dtype=torch.bool)
        dropped[torch.tensor(selection.get(name, range(graph[name].size)), dtype=torch.int64)] = False
        for reader in found:
            module = modules[reader.module]
            plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            if dropped.any() and plain and reader.through == "input":
                readers[reader.parameter] = reader
                gone.setdefault(reader.parameter, []).append(reader.channels[dropped].flatten())
    result = {}
    for parameter, reader in readers.items():
        goes = torch.cat(gone[parameter])
        width = int(tensors_of(model)[parameter].shape[1])
        stays = torch.ones(width, dtype=torch.bool)
        stays[goes] = False
        if stays.any():
            result[parameter] = (reader, stays.nonzero().flatten(), goes)
    return result


def predictors(model: nn.Module, faded: Faded, calibration: Any, ridge: float) -> dict[str, Tensor]:
    r"""Return by weight :math:`\alpha = (G_{KK} + \lambda I)^{-1} G_{KJ}` of the channels that its module reads."""
    tensors = tensors_of(model)
    layouts = {name: Layout("channels", 1, torch.arange(tensors[name].shape[1])) for name in faded}
    modules = dict(model.named_modules())
    gathering = Gathering(layouts, 4096, "annealed redundancy")

    def note(watched: list[tuple[str, Reader]], value: Tensor) -> None:
        for name, reader in watched:
            gathering.note(name, modules[reader.module], value)

    with scoring(model), hooked(model, {n: [r] for n, (r, _, _) in faded.items()}, note), torch.no_grad():
        for images, _ in calibration:
            run(model, images)
    alphas = {}
    for name, (_, stays, goes) in faded.items():
        second = gathering.moments[name].own[0] / gathering.moments[name].rows
        inner = second[stays][:, stays]
        scale = float(inner.diagonal().mean().clamp_min(1e-30))
        eye = torch.eye(len(stays), dtype=inner.dtype)
        alphas[name] = torch.linalg.solve(inner + ridge * scale * eye, second[stays][:, goes]).float()
    return alphas


@torch.no_grad()
def move(model: nn.Module, faded: Faded, alphas: Mapping[str, Tensor]) -> None:
    """Let the weights that read what stays take over those that read what goes, in place."""
    tensors = tensors_of(model)
    for name, (_, stays, goes) in faded.items():
        weight = tensors[name].movedim(1, -1)
        stays, goes = stays.to(weight.device), goes.to(weight.device)
        weight[..., stays] += weight[..., goes] @ alphas[name].T.to(weight)
        weight[..., goes] = 0
