"""Training with MixStyle: batches of two domains, and learning from unlabelled images too (arXiv 2107.02053)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convette.errors import UsageError
from convette.layers.normalization.mixstyle import DomainSampler, MixStyle, run_with_mixstyle, run_without_mixstyle
from convette.training.distributed import world_size
from convette.training.events import Event, Method

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class MixStyleDomains(Method):
    """Train on batches that are half one domain and half another, as ``MixStyle(mix="crossdomain")`` asks.

    `domains` is the domain of every image of `split`, the training split. The order follows from the seed and the
    epoch, so that a resumed run goes on as it would have. Raises `UsageError` where there are not as many domains as
    images, fewer than two, an odd batch size, or several processes.
    """

    def __init__(self, split: Any, domains: Sequence[int] | Tensor, *, name: str = "mixstyle_domains") -> None:
        if len(domains) != len(split):
            raise UsageError(f"{name}: {len(domains)} domains for {len(split)} images.")
        self.name, self.split, self.domains = name, split, torch.as_tensor(domains)
        self.events = frozenset({Event.SETUP})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Give every stage of the run batches of two domains."""
        if world_size() > 1:
            raise UsageError(f"{self.name}: batches of two domains are for one process.")
        trainer.plan = tuple(dataclasses.replace(stage, batches=self._batches(stage)) for stage in trainer.plan)

    def _batches(self, stage: Any) -> Callable[[int, int], Iterator[Any]]:
        from convette.data import Batch

        size = stage.images_per_step // stage.settings.accumulate
        sampler = DomainSampler(self.domains, size, stage.settings.seed)

        def batches(epoch: int, skip: int) -> Iterator[Any]:
            sampler.passes = epoch
            for number, indices in enumerate(sampler):
                if number >= skip:
                    chosen = torch.as_tensor(indices)
                    yield Batch(self.split.images(chosen), self.split.labels[chosen], chosen)

        return batches


class SemiMixStyleTraining(Method):
    """Learn from unlabelled images: pseudo-labels of weak views, learned on strong views whose styles are mixed.

    The labelled images are learned as ever, with MixStyle off. Besides, in every step, as many images of `unlabelled`
    (an image split) join them: without MixStyle the network names all of them; those at least `threshold` sure are
    learned on their strong views, labelled and unlabelled half exchanging styles. The term ``"semi_mixstyle"`` has
    `weight`. `strong` makes a strong view of normalised images; None: a gain and an offset for each image, and a
    square cut out.

    Raises `UsageError` for a network without `MixStyle`. Costs two forward passes more of twice the batch.
    """

    def __init__(
        self,
        unlabelled: Any,
        preprocessing: Callable[[Tensor], Tensor],
        threshold: float = 0.95,
        weight: float = 1.0,
        strong: Callable[[Tensor], Tensor] | None = None,
        *,
        name: str = "semi_mixstyle",
    ) -> None:
        if not 0 <= threshold <= 1 or not weight >= 0:
            raise UsageError(f"{name}: threshold {threshold!r} must be in [0, 1] and weight {weight!r} 0 or more.")
        self.name, self.unlabelled, self.preprocessing = name, unlabelled, preprocessing
        self.threshold, self.weight, self.strong = threshold, weight, strong or strong_view
        self.events = frozenset({Event.SETUP, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS})
        self._layers: list[MixStyle] = []

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Keep MixStyle off the labelled pass, and add the term of the pseudo-labels."""
        state = trainer.state
        if event is Event.SETUP:
            self._layers = [module for module in state.model.modules() if isinstance(module, MixStyle)]
            if not self._layers:
                raise UsageError(f"{self.name}: the network has no MixStyle; insert it first.")
        elif event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD):
            for layer in self._layers:
                layer.active = event is Event.AFTER_FORWARD
        else:
            state.losses.add(self.name, self._term(trainer), self.weight)

    def _term(self, trainer: "Trainer") -> Tensor:
        state = trainer.state
        chosen = torch.randint(len(self.unlabelled), (len(state.images),))
        others = self.preprocessing(self.unlabelled.images(chosen).to(state.device)).to(state.images.dtype)
        both = torch.cat([state.images, others])
        with torch.no_grad(), run_without_mixstyle(state.model):
            sure, pseudo = torch.softmax(state.model(both).float(), 1).max(1)
        with run_with_mixstyle(state.model, "crossdomain"):
            each = F.cross_entropy(state.model(self.strong(both)), pseudo, reduction="none")
        return (each * (sure >= self.threshold)).mean()


def strong_view(images: Tensor) -> Tensor:
    """Return normalised `images` (n, c, h, w) with a gain of 0.5 to 1.5 and an offset of up to 0.5 each, and a square
    of a third of their side cut out."""
    count, _, height, width = images.shape
    gain, offset = (torch.rand(2, count, 1, 1, 1, device=images.device) - 0.5).to(images.dtype)
    side = max(1, min(height, width) // 3)
    top = torch.randint(height - side + 1, (count, 1, 1, 1), device=images.device)
    left = torch.randint(width - side + 1, (count, 1, 1, 1), device=images.device)
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return torch.where(inside, 0.0, images * (1 + gain) + offset)
