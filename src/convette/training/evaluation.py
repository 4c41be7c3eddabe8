"""How good a network is on a split: loss, accuracy, confusion, calibration; and refreshed batch statistics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import DataError, StructureError
from convette.layers._watching import in_eval
from convette.tasks import calibration_error, confusion_matrix
from convette.training._fabric import resolve_device


@dataclass(frozen=True)
class Evaluation:
    """What a network made of n images of k classes.

    `loss` is the mean cross-entropy (nats, no smoothing), `accuracy` top-1 in 0..1, ``confusion[i, j]`` the number of
    images of class i taken for class j, `calibration_error` the expected calibration error over 15 equal bins of
    confidence, in 0..1 (Naeini et al. 2015; Guo et al., arXiv 1706.04599).
    """

    loss: float
    accuracy: float
    confusion: Int64[Tensor, "k k"]
    probabilities: Float[Tensor, "n k"]
    labels: Int64[Tensor, " n"]
    predictions: Int64[Tensor, " n"]
    calibration_error: float

    @property
    def correct(self) -> int:
        """Number of images classified rightly."""
        return int((self.predictions == self.labels).sum())


def evaluate(
    model: nn.Module, split: Any, preprocessing: Any, *, device: str | torch.device = "cpu", batch_size: int = 256
) -> Evaluation:
    """Return the `Evaluation` of `model`, in eval mode and fp32, on `split` (a `convette.data.ImageSplit`).

    `preprocessing` turns the split's bytes into what the network expects. The model is moved to `device` for it; it
    comes back where it was, in the mode it was in. Raises `DataError` for an empty split.
    """
    target = resolve_device(device)
    home = next((parameter.device for parameter in model.parameters()), target)
    model.to(target)
    try:
        with in_eval(model), torch.no_grad():
            return _evaluate(lambda images: model(images.to(target)), split, preprocessing, batch_size, target)
    finally:
        model.to(home)


def evaluate_runner(
    runner: Callable[[Any], Any], split: Any, preprocessing: Any, *, batch_size: int = 256
) -> Evaluation:
    """Return the `Evaluation` of a `convette.runtime.Runner` (an exported file on an engine) on `split`.

    Raises `DataError` for an empty split.
    """

    def run(images: Tensor) -> Tensor:
        return torch.as_tensor(runner(images.numpy()))

    return _evaluate(run, split, preprocessing, batch_size, torch.device("cpu"))


def _evaluate(
    run: Callable[[Tensor], Any], split: Any, preprocessing: Any, batch_size: int, device: torch.device
) -> Evaluation:
    logits, labels = [], []
    for batch in split.batches(batch_size):
        logits.append(run(preprocessing(batch.images.to(device))).float().cpu())
        labels.append(batch.labels.cpu())
    if not logits:
        raise DataError(f"the split {getattr(split, 'name', '')!r} holds no images to evaluate on.")
    return summarise(torch.cat(logits), torch.cat(labels))


def summarise(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> Evaluation:
    """Return the `Evaluation` of `logits` against `labels`; `StructureError` for outputs that are no numbers."""
    probabilities = logits.softmax(1)
    if bad := int(probabilities.isnan().any(1).sum()):
        raise StructureError(
            f"evaluate: the outputs of {bad} of {len(logits)} images are not finite; look for weights, statistics or"
            " inputs that are not (the training that broke them, a precision that is too short)."
        )
    predictions = probabilities.argmax(1)
    return Evaluation(
        loss=float(functional.cross_entropy(logits, labels)),
        accuracy=float((predictions == labels).double().mean()),
        confusion=confusion_matrix(predictions, labels, logits.shape[1]),
        probabilities=probabilities,
        labels=labels,
        predictions=predictions,
        calibration_error=calibration_error(probabilities, labels),
    )


@torch.no_grad()
def score(run: Callable[[Tensor], Any], pairs: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Return ``[summed cross-entropy, images classified rightly, images]`` over `pairs` of images and labels.

    Sums, so that ranks can add theirs up.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in pairs:
        logits = run(images).float()
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += len(labels)
    return sums


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, split: Any, preprocessing: Any, *, batches: int = 20, batch_size: int = 128, seed: int = 0
) -> nn.Module:
    """Compute the running statistics of all batch norms of `model` afresh, in place; returns `model`.

    After pruning or averaging of weights the statistics belong to another network. They become the plain mean over
    `batches` shuffled batches of `split`, without augmentation; weights stay as they are. Costs that many forward
    passes, on the device the model is on.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms or len(split) == 0:
        return model
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    momenta = [norm.momentum for norm in norms]
    try:
        with in_eval(model):
            # Only the norms train: dropout and stochastic depth would bias the statistics.
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean
                norm.train()
            # One image on a 1x1 map has no variance, so a small rest is left out.
            whole = len(split) >= batch_size
            for number, batch in enumerate(split.batches(batch_size, shuffle=True, seed=seed, drop_last=whole)):
                if number >= batches:
                    break
                model(preprocessing(batch.images.to(device)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model
