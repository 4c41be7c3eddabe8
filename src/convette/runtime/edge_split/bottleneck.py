"""The bottleneck that is sent, how it learns to imitate what it replaces, and the filter (arXiv 2007.15818)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import StructureError, TrainingError, UsageError, did_you_mean
from convette.layers import replace_modules
from convette.layers._watching import hooked, in_eval, keeping_outputs


class Bottleneck(nn.Module):
    """An encoder down to `channels` channels and a decoder, in the place of a stage that keeps the resolution.

    Encoder: four 2x2 convolutions with padding 1 (each adds one row and column), to `width`, ``4 width``, `width`,
    `channels`. Decoder: four without padding, to `width`, ``2 width``, `out_channels`, `out_channels`. Batch norms
    between them, no biases. What crosses is ``channels x (h + 4) x (w + 4)``. With 64 -> 256 channels, width 64 and 3
    channels: 148,992 and 428,166 parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if channels < 1:
            raise UsageError(f"channels = {channels}: at least one has to cross.")
        self.encoder = nn.Sequential(
            *_pair(in_channels, width, 1, relu=False),
            *_pair(width, 4 * width, 1),
            *_pair(4 * width, width, 1, relu=False),
            nn.Conv2d(width, channels, 2, padding=1, bias=False),
        )
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            *_pair(channels, width, 0, relu=False),
            *_pair(width, 2 * width, 0),
            *_pair(2 * width, out_channels, 0, relu=False),
            *_pair(out_channels, out_channels, 0),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        """Encode and decode."""
        return self.decoder(self.encoder(x))


def _pair(a: int, b: int, padding: int, relu: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 2, padding=padding, bias=False), nn.BatchNorm2d(b), *([nn.ReLU()] if relu else [])]


def inject(model: nn.Module, at: str, example: Tensor, channels: int = 3, width: int = 64) -> nn.Module:
    """Return a copy of `model` with a `Bottleneck` in the place of the module `at` (one tensor in, one out, same size).

    Raises `StructureError` where that module changes the resolution, or takes or gives anything else; the message names
    stages that can be.
    """
    stages = _stages(model, example)
    if at not in stages:
        # Those at the top of the network: stages, not the layers within them.
        depth = min((name.count(".") for name in stages), default=0)
        fitting = ", ".join([name for name in stages if name.count(".") == depth][:6]) or "none"
        there = bool(at) and at in dict(model.named_modules())
        why = "cannot become a bottleneck: it must map one image to one of equal size" if there else "is not there"
        raise StructureError(f"{type(model).__name__}: module {at!r} {why}. Those that can: {fitting}.")
    made = Bottleneck(*stages[at], channels, width)
    return replace_modules(copy.deepcopy(model), lambda name, old: made if name == at else None)


@torch.no_grad()
def _stages(model: nn.Module, example: Tensor) -> dict[str, tuple[int, int]]:
    """The channels taken and given by each module that maps one image to one of equal size, and runs once."""
    calls: dict[str, list[tuple[int, int] | None]] = {}
    handles = []
    for name, module in model.named_modules():

        def seen(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            calls.setdefault(name, []).append(_shapes(inputs, output))

        if name:
            handles.append(module.register_forward_hook(seen))
    with hooked(handles), in_eval(model):
        model(example)
    # In the order of the network, not of the calls, which end with the innermost.
    ordered = [(name, calls[name]) for name, _ in model.named_modules() if name in calls]
    return {name: found[0] for name, found in ordered if len(found) == 1 and found[0] is not None}


def _shapes(inputs: Any, output: Any) -> tuple[int, int] | None:
    """The channels a module takes and gives, where it maps one image tensor to one of equal size."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return None
    if inputs[0].ndim != 4 or inputs[0].shape[2:] != output.shape[2:]:
        return None
    return int(inputs[0].shape[1]), int(output.shape[1])


def distil_head(
    student: nn.Module,
    teacher: nn.Module,
    batches: Callable[[int], Any],
    at: str,
    *,
    features: Sequence[str] | None = None,
    epochs: int = 5,
    learning_rate: float | int = 1e-3,
    factors: Mapping[str, float] | None = None,
    bits: int | None = None,
) -> list[float]:
    r"""Train only the module `at` of `student` so that features become the teacher's; returns the mean loss an epoch.

    .. math:: L = \sum_f w_f \lVert F_f(x) - F^t_f(x) \rVert^2 / \lVert F^t_f(x) \rVert^2

    With `features` None only `at` itself (head network distillation); naming later modules too makes it the generalised
    kind (GHND), whose gradients come through the frozen rest. The paper sums squares; here they are relative, so that
    one learning rate fits any size. Frozen modules run in eval mode and stay as they are, bit for bit.

    Args:
        batches: ``batches(epoch)`` yields preprocessed images ``n c h w``; no labels are needed.
        factors: weights of features, 1 where not named.
        bits: round what crosses to this many bits while training too, straight through; None: only when it is sent.

    Adam; a tenth of the rate from half, and again from four fifths of the epochs on. Raises `StructureError` for a
    feature that is not there, `TrainingError` for a loss that is not finite.
    """
    names = list(dict.fromkeys([at, *(features or ())]))
    check_features(teacher, names)
    student.eval().requires_grad_(False)
    part = student.get_submodule(at)
    part.train().requires_grad_(True)
    teacher.eval()
    optimizer = torch.optim.Adam(part.parameters(), float(learning_rate))
    milestones = sorted({max(1, round(epochs * share)) for share in (0.5, 0.8)})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    encoder: Any = getattr(part, "encoder", None)
    rounding = (
        [encoder.register_forward_hook(lambda m, i, z: _rounded(z, bits))] if bits and encoder is not None else []
    )
    means = []
    with hooked(rounding):
        for epoch in range(epochs):
            losses = []
            for images in batches(epoch):
                loss = _imitation(student, teacher, images, names, factors or {})
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            schedule.step()
            means.append(float(np.mean(losses)))
            if not np.isfinite(means[-1]):
                raise TrainingError(f"the loss of the bottleneck {at} is not finite; give a smaller learning rate.")
    student.eval().requires_grad_(True)
    return means


def check_features(model: nn.Module, names: Sequence[str]) -> None:
    """Raise `StructureError` for a name of `names` that no module of `model` has."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise StructureError(f"{type(model).__name__} has no module {name!r}.{did_you_mean(name, known)}")


def _imitation(
    student: nn.Module, teacher: nn.Module, images: Tensor, names: Sequence[str], factors: Mapping[str, float]
) -> Tensor:
    with keeping_outputs(student, names) as ours, keeping_outputs(teacher, names) as theirs:
        with torch.no_grad():
            teacher(images)
        student(images)
    loss = torch.zeros(())
    for name in names:
        scale = theirs[name].square().sum().clamp_min(1e-12)
        loss = loss + factors.get(name, 1.0) * (ours[name] - theirs[name]).square().sum() / scale
    return loss


def _rounded(z: Tensor, bits: int) -> Tensor:
    """`z` rounded as the wire will round it, with the gradient of `z` itself."""
    low, high = z.detach().amin(), z.detach().amax()
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return z + (((z - low) / step).round() * step + low - z).detach()


class NeuralFilter(nn.Module):
    """Says from early features (``n c h w``) whether an image holds anything worth sending: two logits.

    `width`: channels behind its first convolution, None: as many as come. 88,402 parameters with 64 channels.
    """

    def __init__(self, channels: int = 64, side: int = 64, width: int | None = None) -> None:
        super().__init__()
        width = width or channels
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(side),
            *(nn.Conv2d(channels, width, 4, 2), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 16, 2), nn.BatchNorm2d(16), nn.ReLU()),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(16 * 64, 2),
        )

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2"]:
        """Return the logits of "nothing" and "something"."""
        return self.layers(features)

    def score(self, features: Tensor) -> Tensor:
        """Return the probability of "something"."""
        return self(features).softmax(1)[:, 1]


def pick_threshold(scores: np.ndarray, worth: np.ndarray, recall: float | int = 0.95) -> float:
    """Return the largest threshold that still passes the share `recall` of images worth sending (``score >= t``).

    Raises `UsageError` where no image is worth sending, or a recall that cannot be.
    """
    positive = np.sort(np.asarray(scores, float)[np.asarray(worth, bool)])[::-1]
    if not len(positive) or not 0 < recall <= 1:
        raise UsageError("pick_threshold needs an image worth sending and a recall in (0, 1].")
    return float(positive[int(np.ceil(recall * len(positive))) - 1])
