"""Distillation: a network learns from another's outputs, and from its inner activations if asked."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._typing import Logits
from convette.errors import UsageError
from convette.layers._watching import in_eval
from convette.training.events import Event, Method
from convette.training.guards import checksums
from convette.training.taps import FeatureTaps

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


def distillation_loss(student: Logits, teacher: Logits, temperature: float | int = 4.0) -> Tensor:
    r"""Return how far the student's softened outputs are from the teacher's, a scalar.

    .. math:: T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(z_t / T)\,\|\,\mathrm{softmax}(z_s / T)\bigr)

    as a mean over images; the factor keeps its gradients at the size of the cross-entropy's. Source: Hinton, Vinyals
    and Dean, arXiv 1503.02531. Raises `UsageError` for a temperature that is not above 0.
    """
    if temperature <= 0:
        raise UsageError(f"distillation: temperature = {temperature!r} cannot be: it must be above 0.")
    student = functional.log_softmax(student.float() / temperature, 1)
    teacher = functional.log_softmax(teacher.float() / temperature, 1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor, adapter: nn.Module | None = None) -> Tensor:
    r"""Return the mean squared difference of two activations after each channel vector is scaled to length 1.

    `student` ``(n, c, ...)`` goes through `adapter` (to the teacher's channels); a teacher of another height and width
    is averaged down (or up) to the student's. Hint losses: Romero et al., arXiv 1412.6550.
    """
    if adapter is not None:
        student = adapter(student)
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        teacher = functional.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    student, teacher = functional.normalize(student.float(), dim=1), functional.normalize(teacher.float(), dim=1)
    return (student - teacher).square().sum(1).mean()


class Distillation(Method):
    """Learn from `teacher`, with the task's own loss at weight ``1 - weight``.

    Adds the loss term ``"distillation"`` (`distillation_loss`, at `weight`) and, for each pair of `features`, one named
    ``"feature:..."`` (`feature_loss`, at `feature_weight`). `features` maps the student's module names to the
    teacher's; where their widths differ, a 1x1 convolution (a linear layer for vectors) on the student's side is
    trained along and thrown away at the end. The teacher sees the same augmented images in eval mode; nothing of it is
    trained. Costs the teacher's forward pass a step. After an edit of the structure that changes a tapped width, its
    adapter starts anew. Raises `UsageError` for values out of range, unknown modules, and another number of classes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float | int = 4.0,
        weight: float | int = 0.9,
        features: Mapping[str, str] | None = None,
        *,
        feature_weight: float | int = 1.0,
        name: str = "distillation",
    ) -> None:
        if temperature <= 0:
            raise UsageError(f"distillation: temperature = {temperature!r} cannot be: it must be above 0.")
        if not 0 <= weight <= 1:
            raise UsageError(f"distillation: weight = {weight!r} cannot be: it must be in [0, 1].")
        self.name = name
        self.events = frozenset({Event.SETUP, Event.AFTER_LOSS, Event.STRUCTURE_CHANGED})
        self.teacher = teacher
        self.temperature = float(temperature)
        self.weight = float(weight)
        self.feature_weight = float(feature_weight)
        self.features = dict(features or {})
        self._taps = FeatureTaps(teacher)

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Set the teacher up, add the loss terms, follow edits of the student."""
        if event is Event.SETUP:
            self._set_up(trainer)
        elif event is Event.AFTER_LOSS:
            self._add_losses(trainer)
        else:
            self._fit_adapters(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the checksum of the teacher; the teacher itself is given again on resuming."""
        return {"teacher": sum(checksums(self.teacher))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise `UsageError` if the run was begun with another teacher."""
        if state["teacher"] != sum(checksums(self.teacher)):
            raise UsageError(f"{self.name}: the checkpoint was written with another teacher; use another folder.")

    def _set_up(self, trainer: "Trainer") -> None:
        self.teacher.to(trainer.state.device).eval()
        self._taps.request(*self.features.values())
        trainer.resources.callback(self._taps.detach)
        trainer.state.taps.request(*self.features)
        self._fit_adapters(trainer)

    def _teach(self, trainer: "Trainer", images: Tensor) -> Tensor:
        with torch.no_grad(), trainer.fabric.autocast():
            return self.teacher(images)

    def _add_losses(self, trainer: "Trainer") -> None:
        state = trainer.state
        logits = self._teach(trainer, state.images)
        state.losses.weights["task"] = 1.0 - self.weight
        state.losses.add(self.name, distillation_loss(state.outputs, logits, self.temperature), self.weight)
        for index, (ours, theirs) in enumerate(self.features.items()):
            adapter = self._adapter(trainer, index)
            # The taps hold what autocast made; adapters are fp32.
            value = feature_loss(state.taps[ours].float(), self._taps[theirs], adapter)
            state.losses.add(f"feature:{ours}", value, self.feature_weight)
        self._taps.clear()

    def _adapter(self, trainer: "Trainer", index: int) -> Any:
        return dict(trainer.state.auxiliary.items()).get(f"{self.name}_{index}")

    def _fit_adapters(self, trainer: "Trainer") -> None:
        """Make, or make anew, the adapters whose widths do not fit."""
        state = trainer.state
        images = state.example[0]
        with in_eval(state.model), torch.no_grad():
            classes, taught = state.model(images).shape[1], self._teach(trainer, images).shape[1]
        if classes != taught:
            raise UsageError(f"distillation: the teacher knows {taught} classes, the student {classes}.")
        for index, (ours, theirs) in enumerate(self.features.items()):
            student, teacher = state.taps[ours], self._taps[theirs]
            adapter = self._adapter(trainer, index)
            width = adapter.weight.shape[1] if adapter is not None else teacher.shape[1]
            if student.shape[1] == width:
                continue
            made = (
                nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
                if student.ndim == 4
                else nn.Linear(student.shape[1], teacher.shape[1], bias=False)
            )
            trainer.add_auxiliary(f"{self.name}_{index}", made)
        state.taps.clear()
        self._taps.clear()
