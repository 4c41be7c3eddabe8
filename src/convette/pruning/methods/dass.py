"""DASS's training of a sparse network: dense, then which weights stay, then those alone (arXiv 2207.06968)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convette.errors import UsageError
from convette.pruning.methods.keep_sparsity import KeepSparsity
from convette.pruning.sparsity import apply_masks, sparse_layers, unstructured_mask
from convette.training import Event

if TYPE_CHECKING:
    from convette.training import Trainer


class ScoreMasks(KeepSparsity):
    r"""Learn which weights stay by a score for each, in the middle of the training, and hold them to its end.

    .. math:: M = \mathrm{top}_{1-\rho}(|S|), \qquad S \leftarrow S - \eta\, \frac{\partial L}{\partial (W M)}\, W,
        \qquad S_0 = \gamma\, W / \max |W|

    Up to the share `dense_share` of the steps the network trains as ever. For `mask_share` of them all its parameters
    rest and only the scores learn, by plain gradient descent at `score_rate`; they begin as magnitudes. Then the masks
    are final: what is masked becomes zero and stays so. Exactly ``round((1 - sparsity) n)`` weights of each layer are
    left. Which layers: `sparse_layers`, so first and last stay dense, and what matches `exclude`. What it ends with is
    an ordinary network with zeros. Validation between the epochs sees the network unmasked until the masks are final.

    Costs a copy of the weights for the scores, and a product a layer in the middle phase. Raises `UsageError` for
    shares that cannot be, and where no layer can be sparse. Source: Mousavi et al., DASS, arXiv 2207.06968; scores:
    Sehwag et al., HYDRA, arXiv 2002.10509.
    """

    name = "score_masks"
    events = frozenset(
        {
            Event.SETUP,
            Event.BATCH_START,
            Event.GRADIENTS_READY,
            Event.AFTER_OPTIMIZER_STEP,
            Event.STRUCTURE_CHANGED,
            Event.FIT_END,
        }
    )

    def __init__(
        self,
        sparsity: float | int = 0.9,
        *,
        dense_share: float = 0.4,
        mask_share: float = 0.2,
        score_rate: float = 0.1,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 0 < sparsity < 1:
            raise UsageError(f"{self.name}: sparsity = {sparsity} must be above 0 and below 1.")
        if min(dense_share, mask_share) < 0 or dense_share + mask_share > 1:
            raise UsageError(
                f"{self.name}: dense_share = {dense_share} and mask_share = {mask_share} must be shares of a training."
            )
        self.sparsity, self.score_rate, self.exclude = float(sparsity), float(score_rate), tuple(exclude)
        self.dense_share, self.mask_share = dense_share, mask_share
        self.scores: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Go through the three phases."""
        model = trainer.state.model
        if event is Event.SETUP:
            if not sparse_layers(model, self.exclude):
                raise UsageError(f"{self.name}: no layer of this network can be sparse; it has no inner one.")
        elif event is Event.BATCH_START:
            phase = self._phase(trainer)
            if phase == "masks":
                self._mask(trainer)
            elif phase == "masked weights" and not self.masks:
                self._settle(trainer)
        elif event is Event.GRADIENTS_READY:
            if self._saved:
                self._learn(trainer)
        elif event is Event.FIT_END:
            if not self.masks:
                self._settle(trainer)
        elif self.masks:
            super().apply(event, trainer)
        elif event is Event.STRUCTURE_CHANGED and self.scores:
            self.scores = {}  # the weights are others: begin with their magnitudes again

    def state_dict(self) -> dict[str, Any]:
        """Return masks and scores."""
        return {**super().state_dict(), "scores": {name: score.cpu() for name, score in self.scores.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state)
        self.scores = dict(state["scores"])

    def _phase(self, trainer: "Trainer") -> str:
        total = sum(stage.steps * stage.settings.epochs for stage in trainer.plan)
        share = trainer.state.clock.step / max(1, total)
        if share < self.dense_share:
            return "weights"
        return "masks" if share < self.dense_share + self.mask_share else "masked weights"

    @torch.no_grad()
    def _mask(self, trainer: "Trainer") -> None:
        """Let the network of this step be the masked one; the weights are put back when its gradients are there."""
        weights = sparse_layers(trainer.state.model, self.exclude)
        if set(self.scores) != set(weights):
            self.scores = {name: first_scores(weight.detach()) for name, weight in weights.items()}
        for name, weight in weights.items():
            self.scores[name] = self.scores[name].to(weight.device)
            self._saved[name] = weight.detach().clone()
            weight.masked_fill_(~unstructured_mask(self.scores[name].abs(), self.sparsity), 0.0)

    @torch.no_grad()
    def _learn(self, trainer: "Trainer") -> None:
        weights = sparse_layers(trainer.state.model, self.exclude)
        for name, saved in self._saved.items():
            weight = weights[name]
            # Straight through to all scores: one that is masked out must be able to come back.
            if weight.grad is not None:
                self.scores[name] -= self.score_rate * weight.grad.float() * saved.float()
            weight.copy_(saved)
        self._saved = {}
        for parameter in trainer.state.model.parameters():
            parameter.grad = None  # so that no optimiser moves it, by momentum or decay either

    def _settle(self, trainer: "Trainer") -> None:
        weights = sparse_layers(trainer.state.model, self.exclude)
        scores = self.scores if set(self.scores) == set(weights) else {}
        self.masks = {
            name: unstructured_mask(scores.get(name, weight.detach()).abs().to(weight.device), self.sparsity)
            for name, weight in weights.items()
        }
        apply_masks(trainer.state.model, self.masks)
        if trainer.state.ema is not None:
            apply_masks(trainer.state.ema.module, self.masks)


def first_scores(weight: Tensor) -> Tensor:
    r"""Return :math:`\gamma W / \max|W|`, :math:`\gamma = \sqrt{6 / fan_{in}}`: their order is that of magnitude."""
    return weight.float() / weight.abs().max().clamp_min(1e-12) * (6 / weight[0].numel()) ** 0.5
