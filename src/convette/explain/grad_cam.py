"""Grad-CAM: where the features of the last stage speak for a class (Selvaraju et al. 2017, arXiv 1610.02391)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette._typing import Images
from convette.errors import UsageError
from convette.explain._explanation import Explanation, enlarge, normalise, similarity
from convette.explain._run import Score, channels_first, run_with_tap
from convette.explain.layers import resolve_layer

ClassIndex = int | Sequence[int] | Tensor | None


class GradCAM:
    """Class activation map weighted by gradients.

    ``w_c = mean over positions of d score / d A_c``, ``map = relu(sum over c of w_c A_c)``, then scaled to 0..1 in each
    image and interpolated to its size. A is the output of the chosen layer, score the logit of the class.

    Args:
        model: any network with maps (n, c, h, w) inside; pruned and folded ones too. Left exactly as it was.
        layer: name or module; None: the last spatial stage, chosen from a run on the first images.
        score: from the network's output to one number an image, for outputs that are not logits (n, classes).

    Cost: one forward, and a backward from the logits to the layer; the parameters' gradients are not touched.

    Source: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, arXiv 1610.02391.
    """

    method = "grad_cam"

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None, score: Score | None = None) -> None:
        self.model, self.layer, self.score = model, layer, score

    def __call__(self, images: Images, class_index: ClassIndex = None) -> Float[Tensor, "n h w"]:
        """Return the maps of `images`, 0 to 1.

        `class_index` is one class for all images or one for each; None: the class predicted for each.

        Raises:
            UsageError: a class out of range, a layer without a map, or an output without logits.
        """
        return self.explain(images, class_index).maps

    def explain(self, images: Images, class_index: ClassIndex = None) -> Explanation:
        """Return the maps with layer, classes and scores; arguments as in the call."""
        choice = resolve_layer(self.model, self.layer, images)
        with torch.inference_mode(False), torch.enable_grad():
            # Images made in inference mode cannot take part in a graph; a copy can.
            tap = run_with_tap(self.model, choice.name, images.clone(), gradient=True)
            if self.score is not None:
                classes, scores = None, _given_scores(self.score(tap.output), len(images))
            else:
                classes, scores = class_scores(tap.output, class_index)
            if not scores.requires_grad:
                raise UsageError(f"the score does not depend on layer {choice.name!r}; choose one on the way to it.")
            (gradient,) = torch.autograd.grad(scores.sum(), tap.features, allow_unused=True)
        if gradient is None:
            raise UsageError(f"the score does not depend on layer {choice.name!r}; choose one on the way to it.")
        features = channels_first(tap.features.detach(), choice.name).float()
        weights = channels_first(gradient, choice.name).float().mean((2, 3), keepdim=True)
        raw = (weights * features).sum(1).clamp_min(0)
        return Explanation(
            method=self.method,
            layer=choice.name,
            reason=choice.reason,
            maps=enlarge(normalise(raw), (images.shape[2], images.shape[3])),
            raw=raw,
            classes=classes,
            scores=scores.detach().float(),
            similarity=similarity(raw, choice.name),
        )


def grad_cam(
    model: nn.Module, images: Images, class_index: ClassIndex = None, *, layer: str | nn.Module | None = None
) -> Float[Tensor, "n h w"]:
    """Return the Grad-CAM maps of `images`; see `GradCAM`."""
    return GradCAM(model, layer)(images, class_index)


def class_scores(output: Any, class_index: ClassIndex) -> tuple[Tensor, Tensor]:
    """Return for each image the class and its score: the logit, or for dense outputs the mean logit of the pixels.

    Raises:
        UsageError: an output without logits, or a class out of range.
    """
    logits = _logits(output)
    if logits.ndim == 4:
        logits = logits.mean((2, 3))
    count, classes = logits.shape
    if class_index is None:
        index = logits.detach().argmax(1)
    else:
        index = torch.as_tensor(class_index, dtype=torch.int64, device=logits.device).reshape(-1)
        if len(index) == 1:
            index = index.expand(count)
        if len(index) != count:
            raise UsageError(f"class_index has {len(index)} classes for {count} images; give one, or one an image.")
        if int(index.min()) < 0 or int(index.max()) >= classes:
            raise UsageError(f"class_index must lie within 0..{classes - 1}, the classes of this network.")
    return index.clone(), logits.gather(1, index[:, None]).squeeze(1)


def _logits(output: Any) -> Tensor:
    """Find (n, classes) or (n, classes, h, w) in what a network gives out."""
    candidates: list[Any] = [output]
    if isinstance(output, dict):
        candidates = list(output.values())
    elif isinstance(output, tuple | list):
        candidates = list(output)
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.ndim in (2, 4) and candidate.is_floating_point():
            return candidate
        if isinstance(candidate, Tensor) and candidate.ndim == 1 and candidate.is_floating_point():
            return candidate[:, None]
    raise UsageError(
        "this network gives out no logits (n, classes); give score=, a function from its output to one number an image."
    )


def _given_scores(scores: Any, count: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UsageError(f"score= must return one number an image, a tensor of shape ({count},), not {shape}.")
    return scores
