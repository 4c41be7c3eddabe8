"""Dynamic channel propagation: only useful channels take part in training (Shen et al., arXiv 2007.01486).

The saliency is taken where units are read, behind the activation: for ReLU it is the same as at the norm's output,
where the authors' code takes it, and what a removed channel does to its readers is what a closed one does.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convette.cost import Budget, WidthCost, count
from convette.errors import UsageError
from convette.pruning._distributed import decided_by_main_rank
from convette.pruning._measured import MEASURED
from convette.pruning.allocation import WidthRules, global_ranking
from convette.pruning.criteria._observing import Reader, find_readers
from convette.pruning.methods._units import check_groups, groups_of, kept_selection
from convette.pruning.methods.gradual_pruning import one_image
from convette.surgery import ChannelGraph, trace
from convette.training import Event, Method

if TYPE_CHECKING:
    from convette.training import Trainer


class DynamicChannelPropagation(Method):
    r"""Keep a utility a channel while training; channels below a global threshold are closed, at the end cut.

    At every step, with x what the readers of a unit read and B images,

    .. math:: v_u = \frac{1}{B} \sum_b \Bigl| \sum_{h,w} \frac{\partial L}{\partial x_{b,u,h,w}} x_{b,u,h,w} \Bigr|,
        \qquad U_u \leftarrow \lambda\, U_u + v_u / \max_w v_w \quad (u \text{ open})

    and a closed unit keeps its U, so that it opens again once open ones fall below it. The round(P times all units)
    units of least U are closed; what reads them reads 0, in training and evaluation, and their makers get no gradient
    (weight decay and momentum still move them). After the last epoch they are removed; the outputs stay the same.

    - `rate` (P, default 0.4): the share of all units that goes; or `budget`: limits on macs, parameters or size, met by
      closing the units of least U in order.
    - `decay` (lambda, 0.6): rises by 0.1 at each of `milestones` (shares of the training) and is 1 from the last on.
    - `explore` (default 0.05): the share of the training at whose start all are open.
    - `every`: steps between two updates of what is closed. `at_least`: units a group keeps.
    - `normalise`: v is divided by its "max" in the group (default) or its "mean", which one outlier moves less.
    - `groups`: "inner" (default, as published for ResNets), or "all", residual streams as well. Groups whose counts are
      constrained (grouped convolutions) and those that no convolution or linear layer reads stay open.

    Raises `UsageError` for choices that cannot be. Costs a product and a sum a reader and step. Folds away exactly: the
    cut network is the closed one.
    """

    name = "dynamic_channel_propagation"
    order = -100
    events = frozenset({Event.SETUP, Event.FIT_START, Event.BATCH_START, Event.GRADIENTS_READY, Event.EPOCH_END})
    changes_structure = True

    def __init__(
        self,
        rate: float | int = 0.4,
        *,
        budget: str | None = None,
        decay: float | int = 0.6,
        milestones: Sequence[float] = (0.5, 0.75, 0.95),
        explore: float | int = 0.05,
        every: int = 1,
        at_least: int = 1,
        groups: str = "inner",
        normalise: str = "max",
    ) -> None:
        if normalise not in ("max", "mean"):
            raise UsageError(f"{self.name}: normalise={normalise!r} is none of 'max', 'mean'.")
        if not 0 <= rate < 1 or not 0 <= decay <= 1 or not 0 <= explore < 1 or every < 1 or at_least < 1:
            raise UsageError(
                f"{self.name}: rate={rate}, decay={decay}, explore={explore} must be shares, every={every} and"
                f" at_least={at_least} at least 1."
            )
        measured = [str(one) for one in Budget.parse(budget).limits if one.metric in MEASURED] if budget else []
        if measured:
            raise UsageError(f"pruning during training counts, it does not measure: {measured[0]} is for `prune`.")
        check_groups(groups, self.name)
        self.rate, self.decay, self.milestones = float(rate), float(decay), tuple(milestones)
        self.budget, self.explore, self.every, self.at_least, self.groups = budget, explore, every, at_least, groups
        self.normalise = normalise
        self.utility: dict[str, Tensor] = {}
        self.open: dict[str, Tensor] = {}
        self.finished = False
        self._gates: Gatekeeper | None = None
        self._graph: ChannelGraph | None = None
        self._costs: tuple[WidthCost, tuple[Any, ...]] | None = None

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Hang the gates up, open and close them, gather utilities, cut."""
        if event is Event.SETUP:
            self._set_up(trainer)
        elif self.finished or self._gates is None:
            return
        elif event is Event.FIT_START:
            self._gates.open = self.open  # a resumed run has loaded them meanwhile
        elif event is Event.BATCH_START and trainer.state.clock.step % self.every == 0:
            if self._progress(trainer) >= self.explore:
                self._close(trainer)
        elif event is Event.GRADIENTS_READY:
            self._remember(self.decay_at(self._progress(trainer)))
        elif event is Event.EPOCH_END and self._last(trainer):
            self._cut(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return utilities and what is open."""
        return {"utility": self.utility, "open": self.open, "finished": self.finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.utility, self.open = dict(state["utility"]), dict(state["open"])
        self.finished = bool(state["finished"])
        if self.finished and self._gates is not None:
            self._gates.close()

    def decay_at(self, share: float) -> float:
        """Return lambda at this share of the training."""
        passed = sum(share >= milestone for milestone in self.milestones)
        return 1.0 if self.milestones and passed == len(self.milestones) else min(1.0, self.decay + 0.1 * passed)

    def _set_up(self, trainer: "Trainer") -> None:
        model, example = trainer.state.model, one_image(trainer.state.example)
        self._graph = trace(model, example)
        readers = find_readers(model, self._graph)
        names = [group.name for group in groups_of(self._graph, self.groups, free=True)]
        watched = {n: [r for r in readers.get(n, ()) if r.through == "input"] for n in names}
        watched = {name: found for name, found in watched.items() if found}
        if not watched:
            raise UsageError(f"{self.name}: the network has no channels that could be closed.")
        if self.budget is not None:
            limits = Budget.parse(self.budget).resolve(count(model, example)).limits
            self._costs = (WidthCost(model, example, self._graph), limits)
        sizes = {name: self._graph[name].size for name in watched}
        self.utility = {name: torch.full((size,), 1 / size) for name, size in sizes.items()}
        self.open = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
        # The averaged network is what validation sees: it is gated like the one that learns.
        averaged = [trainer.state.ema.module] if trainer.state.ema is not None else []
        self._gates = Gatekeeper([model, *averaged], watched, self.open)
        trainer.resources.callback(self._gates.close)

    def _progress(self, trainer: "Trainer") -> float:
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        return trainer.state.clock.step / total

    def _last(self, trainer: "Trainer") -> bool:
        clock = trainer.state.clock
        return clock.stage == len(trainer.plan) - 1 and clock.epoch == trainer.stage.settings.epochs

    def _remember(self, decay: float) -> None:
        assert self._gates is not None
        for name, value in self._gates.take().items():
            scale = value.amax() if self.normalise == "max" else value.mean()
            if torch.isfinite(scale):  # a step that overflowed says nothing
                utility = torch.where(self.open[name], decay * self.utility[name], self.utility[name])
                self.utility[name] = utility + value / scale if scale > 0 else utility

    def _close(self, trainer: "Trainer") -> None:
        """Open and close by the utilities as they are now."""
        assert self._gates is not None and self._graph is not None
        decided = decided_by_main_rank(self._choose)
        self.open = {name: torch.tensor(flags) for name, flags in decided.items()}
        self._gates.open = self.open

    def _choose(self) -> dict[str, list[bool]]:
        if self._costs is not None:
            assert self._graph is not None
            widths, limits = self._costs
            rules = WidthRules(minimum=dict.fromkeys(self.utility, self.at_least))
            selection = global_ranking(self.utility, self._graph, widths, limits, rules=rules)
            flags = {n: torch.zeros(len(u), dtype=torch.bool) for n, u in self.utility.items()}
            for name, flag in flags.items():
                flag[selection.get(name, slice(None))] = True
            return {name: flag.tolist() for name, flag in flags.items()}
        return {name: flag.tolist() for name, flag in open_units(self.utility, self.rate, self.at_least).items()}

    def _cut(self, trainer: "Trainer") -> None:
        assert self._gates is not None and self._graph is not None
        if self._progress(trainer) >= self.explore:
            self._close(trainer)
        self._gates.close()
        self.finished = True
        selection = kept_selection(self.open)
        if selection:
            trainer.edit_structure([self._graph.shrink(selection)])


def open_units(utility: Mapping[str, Tensor], rate: float, at_least: int = 1) -> dict[str, Tensor]:
    """Return which units stay open (bool): all but the round(rate times all) of least utility, `at_least` a group."""
    names = list(utility)
    flat = torch.cat([utility[name] for name in names])
    keep = torch.ones(len(flat), dtype=torch.bool)
    safe = torch.cat([_best(utility[name], at_least) for name in names])
    order = torch.where(safe, torch.inf, flat).argsort(stable=True)
    keep[order[: min(round(rate * len(flat)), int((~safe).sum()))]] = False
    return dict(zip(names, keep.split([len(utility[name]) for name in names]), strict=True))


def _best(utility: Tensor, count: int) -> Tensor:
    best = torch.zeros(len(utility), dtype=torch.bool)
    best[utility.topk(min(count, len(utility))).indices] = True
    return best


class Gatekeeper:
    """Gates in front of the modules that read each group, which also gather what each unit is worth to the loss.

    They hang in all of `models`, which are copies of one network; what learns is the one in training mode.
    """

    def __init__(
        self, models: Sequence[nn.Module], readers: Mapping[str, list[Reader]], flags: Mapping[str, Tensor]
    ) -> None:
        self.open = flags
        self._worth: dict[str, Tensor] = {}
        by_module: dict[str, list[tuple[str, Reader]]] = {}
        for group, found in readers.items():
            for reader in found:
                by_module.setdefault(reader.module, []).append((group, reader))
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(watched))
            for model in models
            for name, watched in by_module.items()
        ]

    def close(self) -> None:
        """Take the gates away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[str, Tensor]:
        """Return the worth of each unit since the last call, and forget it."""
        found, self._worth = self._worth, {}
        return found

    def _hook(self, watched: list[tuple[str, Reader]]) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...]) -> Any:
            value = args[0]
            for group, reader in watched:
                if not self.open[group].all():
                    value = _closed(value, reader, self.open[group])
            if module.training and value.requires_grad:
                value = value * 1 if value is args[0] else value
                read = value.detach()
                value.register_hook(lambda slope: self._gather(watched, slope.detach() * read))
            return (value, *args[1:])

        return gate

    def _gather(self, watched: list[tuple[str, Reader]], product: Tensor) -> None:
        for group, reader in watched:
            worth = reader.take(product.float()).flatten(2).sum(dim=2).abs().mean(dim=0).cpu()
            self._worth[group] = self._worth[group] + worth if group in self._worth else worth


def _closed(value: Tensor, reader: Reader, flags: Tensor) -> Tensor:
    factors = torch.ones(value.shape[reader.axis], dtype=value.dtype, device=value.device)
    factors[reader.channels[~flags].flatten().to(value.device)] = 0
    shape = [1] * value.ndim
    shape[reader.axis] = -1
    return value * factors.view(shape)
