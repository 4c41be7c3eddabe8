"""The two searches: remove, then shrink; each student is taught briefly and rewarded, the policy learns from that."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._progress import progress
from convette.cost import Budget, count
from convette.data import ImageData
from convette.errors import BudgetError, StructureError, UsageError
from convette.pruning._blocks import drop_blocks, without_blocks
from convette.pruning._calibration import draw_calibration
from convette.pruning._reinforce import Reinforce
from convette.pruning._widths import width_constraints
from convette.pruning.allocation._ladder import Ladder, WidthRules, build_ladders
from convette.pruning.allocation._search import selection_of
from convette.pruning.criteria import NEED_DATA, score_units
from convette.pruning.n2n.policies import FACTORS, LayerFacts, RemovalPolicy, ShrinkPolicy, layer_states
from convette.pruning.n2n.rewards import constrained_reward, student_reward
from convette.pruning.precropping import initialise_again
from convette.pruning.recovery import RECOVERY, recalibrate
from convette.surgery import ChannelGraph, apply, removable, trace
from convette.training import Distillation, TrainSettings, evaluate, train


@dataclass(frozen=True)
class N2NSettings:
    """How N2N searches.

    - `removal_epochs`, `shrink_epochs`: updates of each policy (0 leaves the stage out), of `rollouts` students each.
    - `student_epochs`: of distillation, before a student is judged; `inherit`: it starts with its teacher's weights,
      cut (else afresh, as published: ranks then say what trains well in so short a time).
    - `loss`: students learn from their teacher by "kl" (divergence at temperature 4) or, as published, by "mse" of the
      logits; `label_weight`: the share of the labels' cross-entropy in it.
    - `finalists`: so many of the best students are trained for `final_epochs` more and judged again: what trains best
      in a short time need not end best. With 1, the best student is returned as the search trained it.
    - `metric`: the cost that is compressed ("macs", "parameters", "size"). `removal_rate`, `shrink_rate`: of learning.
    - `criterion`: which units stay in a shrunk group. `factors`: what a group may be multiplied by.
    - `least`: channels of a group that stay at least (or all, of a smaller one). `multiple_of`, `min_fraction`,
      `constraints`: as in `PruneSettings`.
    """

    removal_epochs: int = 10
    shrink_epochs: int = 10
    rollouts: int = 4
    student_epochs: int = 1
    inherit: bool = True
    loss: Literal["kl", "mse"] = "kl"
    label_weight: float = 0.1
    finalists: int = 1
    final_epochs: int = 3
    metric: Literal["macs", "parameters", "size"] = "parameters"
    removal_rate: float = 0.003
    shrink_rate: float = 0.01
    criterion: str = "l1"
    factors: tuple[float, ...] = FACTORS
    least: int = 10
    multiple_of: int = 1
    min_fraction: float | int = 0.0
    constraints: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rollouts < 1 or min(self.removal_epochs, self.shrink_epochs, self.student_epochs) < 0:
            raise UsageError("n2n: rollouts must be at least 1, epochs at least 0.")
        if self.finalists < 1 or self.final_epochs < 1 or not 0 <= self.label_weight <= 1:
            raise UsageError("n2n: finalists and final_epochs must be at least 1, label_weight a share.")
        if self.loss not in ("kl", "mse"):
            raise UsageError(f"n2n: loss = {self.loss!r} is none of 'kl', 'mse'.")
        if not (self.removal_epochs or self.shrink_epochs):
            raise UsageError("n2n: both stages have 0 epochs; there is nothing to search.")


@dataclass(frozen=True)
class Student:
    """One that was tried: the blocks left out and the factor of each group, its accuracy (validation), cost, reward."""

    blocks: tuple[str, ...]
    factors: tuple[tuple[str, float], ...]
    accuracy: float
    cost: float
    reward: float


@dataclass(frozen=True)
class N2NResult:
    """The best student, trained as long as the search trained it (train it on), and all that were tried, in order.

    `rewards`: the mean of each update. `removal`, `shrink`: the policies' weights, to begin another search with: the
    states they read are those of any network.
    """

    model: nn.Module
    best: Student
    students: tuple[Student, ...]
    rewards: tuple[float, ...]
    teacher_accuracy: float
    removal: dict[str, Tensor]
    shrink: dict[str, Tensor]


def n2n(
    teacher: nn.Module,
    data: ImageData,
    settings: N2NSettings | None = None,
    *,
    budget: Budget | str | None = None,
    train_settings: TrainSettings | None = None,
    removal: dict[str, Tensor] | None = None,
    shrink: dict[str, Tensor] | None = None,
    device: str | torch.device = "auto",
) -> N2NResult:
    r"""Search a smaller network by two policies, and return the best student of the whole search.

    .. math:: R = \frac{acc_s}{acc_t}\, C (2 - C), \qquad C = 1 - \frac{cost_s}{cost_t}

    Stage 1 decides for every block that can be left out whether it goes; stage 2, on the best network of stage 1, by
    what factor every group of channels shrinks. Each student is distilled for ``student_epochs`` and rewarded on the
    validation split; equal ones are judged once. REINFORCE with a moving baseline, a reward for each rollout. `budget`
    adds constraints (`constrained_reward`); a student no smaller than its teacher is rewarded -1 untrained.

    `removal` and `shrink` are policies of an earlier search to start from. Raises `UsageError` for a budget that is not
    counted, `StructureError` for a network without anything to decide. Costs ``(removal_epochs + shrink_epochs) *
    rollouts`` short trainings at most. Source: Ashok et al., N2N Learning, arXiv 1709.06030.
    """
    search = _Search(teacher, data, settings or N2NSettings(), budget, train_settings, device)
    search.run(removal, shrink)
    return search.result()


class LogitMatching(Distillation):
    """Learn from a teacher by the mean squared error of the logits, as N2N's students do."""

    def _add_losses(self, trainer: Any) -> None:
        losses, logits = trainer.state.losses, self._teach(trainer, trainer.state.images)
        losses.weights["task"] = 1.0 - self.weight
        losses.add(self.name, functional.mse_loss(trainer.state.outputs.float(), logits.float()), self.weight)


class _Search:
    def __init__(
        self,
        teacher: nn.Module,
        data: ImageData,
        settings: N2NSettings,
        budget: Budget | str | None,
        train_settings: TrainSettings | None,
        device: str | torch.device,
    ) -> None:
        self.teacher, self.data, self.settings, self.device = copy.deepcopy(teacher).eval(), data, settings, device
        # Students learn for a few steps only: an average over steps would mostly show where they began.
        self.train_settings = replace(train_settings or RECOVERY, ema_decay=None)
        self.example = data.preprocessing(data.train.images(torch.tensor([0])))
        self.start = count(self.teacher, self.example)
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        if budget is not None and (bad := [one for one in budget.limits if one.metric == "latency"]):
            raise UsageError(f"n2n: {bad[0]} is measured; limit macs, parameters, size or memory.")
        self.budget = budget.resolve(self.start) if budget is not None else None
        self.teacher_accuracy = self._accuracy(self.teacher)
        self.generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.removal, self.shrink = RemovalPolicy(), ShrinkPolicy(factors=settings.factors)
        self.seen: dict[tuple[Any, Any], Student] = {}
        self.order: list[Student] = []
        self.rewards: list[float] = []
        self.top: list[tuple[Student, nn.Module]] = []  # the best reward first
        self.smallest = float(self.start.get(settings.metric))
        self.bases: dict[tuple[str, ...], tuple[nn.Module, ChannelGraph, list[Ladder]]] = {}

    def run(self, removal: dict[str, Tensor] | None, shrink: dict[str, Tensor] | None) -> None:
        for policy, weights in ((self.removal, removal), (self.shrink, shrink)):
            if weights is not None:
                policy.load_state_dict(weights)
        choices, blocks = self.settings, removable(self.teacher, self.example)
        if not blocks and not choices.shrink_epochs:
            raise StructureError(f"{type(self.teacher).__name__} has no block that can be left out.")
        gone: tuple[str, ...] = ()
        if blocks and choices.removal_epochs:
            self._removing(blocks)
            gone = self.top[0][0].blocks if self.top else ()
        if choices.shrink_epochs:
            self._shrinking(gone)
        if not self.top and self.budget is not None:
            raise BudgetError(
                f"n2n: none of {len(self.order)} students met the budget '{self.budget}'; the smallest has"
                f" {self.smallest:,.0f} {choices.metric}. Raise shrink_epochs or the budget, or lower least."
            )
        if not self.top:
            raise StructureError("n2n: no student was smaller than its teacher; allow smaller factors, or more epochs.")

    def result(self) -> N2NResult:
        student, model = self.top[0] if self.settings.finalists == 1 else self._final()
        return N2NResult(
            model.eval(),
            student,
            tuple(self.order),
            tuple(self.rewards),
            self.teacher_accuracy,
            self.removal.state_dict(),
            self.shrink.state_dict(),
        )

    def _removing(self, blocks: Sequence[str]) -> None:
        states = layer_states([self._facts_of(self.teacher.get_submodule(name)) for name in blocks])

        def roll() -> tuple[tuple[Any, Any], Tensor]:
            removed, log = self.removal.sample(states, [True] * len(blocks), self.generator)
            return (tuple(name for name, goes in zip(blocks, removed, strict=True) if goes), ()), log

        self._learn("removal", self.removal, self.settings.removal_rate, self.settings.removal_epochs, roll)

    def _shrinking(self, gone: tuple[str, ...]) -> None:
        network = without_blocks(self.teacher, gone)
        graph = trace(network, self.example)
        modules = dict(network.named_modules())
        names = [group.name for group in graph.groups]
        if not names:
            raise StructureError(f"{type(network).__name__} has no channels that can go.")
        facts = [self._facts_of(modules.get(name, network), graph[name].size) for name in names]
        states = layer_states(facts)

        def roll() -> tuple[tuple[Any, Any], Tensor]:
            factors, log = self.shrink.sample(states, [True] * len(names), self.generator)
            return (gone, tuple(zip(names, factors, strict=True))), log

        self._learn("shrinkage", self.shrink, self.settings.shrink_rate, self.settings.shrink_epochs, roll)

    def _learn(
        self, title: str, policy: nn.Module, rate: float, epochs: int, roll: Callable[[], tuple[Any, Tensor]]
    ) -> None:
        learner = Reinforce(list(policy.parameters()), rate)
        with progress(f"n2n {title}", epochs, "update") as advance:
            for epoch in range(epochs):
                logs, rewards = [], []
                for _ in range(self.settings.rollouts):
                    plan, log = roll()
                    student = self._judge(plan)
                    met = student.reward > -1 and self._within(student)
                    rewards.append(constrained_reward(student.reward, met, epoch) if self.budget else student.reward)
                    logs.append(log)
                learner.step(logs, rewards)
                self.rewards.append(sum(rewards) / len(rewards))
                advance(1, detail=f"reward {self.rewards[-1]:.3f}")

    def _judge(self, plan: tuple[Any, Any]) -> Student:
        if plan in self.seen:
            return self.seen[plan]
        blocks, factors = plan
        model = self._build(blocks, factors)
        cost, before = (float(c.get(self.settings.metric)) for c in (count(model, self.example), self.start))
        self.smallest = min(self.smallest, cost)
        if cost >= before:
            student = Student(blocks, factors, 0.0, cost, -1.0)
        else:
            accuracy = self._taught(model)
            student = Student(
                blocks, factors, accuracy, cost, student_reward(accuracy, self.teacher_accuracy, cost, before)
            )
            allowed = self.budget is None or self._within(student, model)
            if allowed:
                # Of equal rewards the first one stays ahead.
                ranked = sorted([*self.top, (student, model)], key=lambda entry: -entry[0].reward)
                self.top = ranked[: self.settings.finalists]
        self.seen[plan] = student
        self.order.append(student)
        return student

    def _build(self, blocks: Sequence[str], factors: Sequence[tuple[str, float]]) -> nn.Module:
        if factors:
            base, graph, ladders = self._base(tuple(blocks))
            model, wanted = copy.deepcopy(base), dict(factors)
            rungs = {
                ladder.name: min(
                    range(len(ladder.widths)),
                    key=lambda rung, ladder=ladder: abs(ladder.widths[rung] - wanted[ladder.name] * ladder.size),
                )
                for ladder in ladders
            }
            selection = selection_of(ladders, rungs)
            if selection:
                apply(model, graph.shrink(selection))
        else:
            model = drop_blocks(copy.deepcopy(self.teacher), blocks)
        if not self.settings.inherit:
            initialise_again(model, self.settings.seed)
        return model

    def _base(self, blocks: tuple[str, ...]) -> tuple[nn.Module, ChannelGraph, list[Ladder]]:
        """Return the teacher without `blocks`, its graph and the order in which units go: the same for all its cuts."""
        if blocks not in self.bases:
            choices, model = self.settings, drop_blocks(copy.deepcopy(self.teacher), blocks)
            wanted = width_constraints(choices.constraints, choices.multiple_of, choices.min_fraction)
            graph, batches = trace(model, self.example).constrain(wanted, allow_nothing=True), None
            if choices.criterion in NEED_DATA:
                batches = draw_calibration(self.data, 256, seed=choices.seed, device="cpu")
            scores = score_units(choices.criterion, model, graph, batches, seed=choices.seed)
            least = {group.name: min(group.size, choices.least) for group in graph.groups}
            self.bases[blocks] = model, graph, build_ladders(scores, graph, WidthRules(1, least))
        return self.bases[blocks]

    def _taught(self, model: nn.Module) -> float:
        if self.settings.inherit:
            # A cut moves what batch norms see: without this a student is judged by statistics that are not its own.
            recalibrate(model, self.data, batches=4, seed=self.settings.seed)
        if self.settings.student_epochs:
            model = self._trained(model, self.settings.student_epochs)
        return self._accuracy(model)

    def _trained(self, model: nn.Module, epochs: int) -> nn.Module:
        """Train `model` in place, taught by the teacher; returns it."""
        kind = LogitMatching if self.settings.loss == "mse" else Distillation
        teacher = kind(copy.deepcopy(self.teacher), weight=1 - self.settings.label_weight)
        chosen = replace(self.train_settings, epochs=epochs)
        return train(model, self.data, chosen, methods=(teacher,), device=self.device, title="n2n student").model

    def _final(self) -> tuple[Student, nn.Module]:
        """Train the finalists on and return the one that is worth most then, with its new accuracy and reward."""
        before, judged = float(self.start.get(self.settings.metric)), []
        for student, model in self.top:
            model = self._trained(model, self.settings.final_epochs)
            accuracy = self._accuracy(model)
            reward = student_reward(accuracy, self.teacher_accuracy, student.cost, before)
            judged.append((replace(student, accuracy=accuracy, reward=reward), model))
        return max(judged, key=lambda entry: entry[0].reward)

    def _within(self, student: Student, model: nn.Module | None = None) -> bool:
        if self.budget is None:
            return True
        model = model if model is not None else self._build(student.blocks, student.factors)
        return self.budget.met(count(model, self.example))

    def _accuracy(self, model: nn.Module) -> float:
        return float(evaluate(model, self.data.validation, self.data.preprocessing, device=self.device).accuracy)

    @staticmethod
    def _facts_of(module: nn.Module, channels: int | None = None) -> LayerFacts:
        layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        if not layers:
            return LayerFacts(0, 1, 1, channels or 1, 0)
        first = layers[0]
        if isinstance(first, nn.Linear):
            return LayerFacts(1, 1, 1, channels or first.out_features, 0)
        kind = 4 if len(layers) > 1 else 3 if first.groups > 1 else 2
        padding = first.padding[0] if isinstance(first.padding, tuple) else first.kernel_size[0] // 2
        return LayerFacts(kind, first.kernel_size[0], first.stride[0], channels or first.out_channels, int(padding))
