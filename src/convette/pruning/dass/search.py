"""The search: weights dense, then masks, then weights under the masks; operations by the loss of the sparse network."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._progress import note, progress
from convette.data import ImageData
from convette.errors import TrainingError, UsageError
from convette.pruning.dass.cells import CellNet, Genotype
from convette.pruning.dass.layers import masks_fixed, masks_off


@dataclass(frozen=True)
class DASSSettings:
    """How the search runs (published: 50 epochs of batches of 64, 16 channels, 8 cells).

    - `sparsity` (rho): of every sparse operation. `sparse_objective` False judges operations dense, as DARTS does.
    - `dense_share`, `mask_share`: of the epochs, for phase A (weights, masks off) and B (masks, weights frozen); the
      rest is C (weights under fixed masks). Operations are judged in B and C.
    - `most_skips`: the search ends, with the cells of the epoch before, once the normal cell has more skips than this
      (None: never): such searches collapse to skips, the sooner the sparser the convolutions.
    """

    sparsity: float = 0.9
    channels: int = 16
    cells: int = 8
    epochs: int = 50
    batch_size: int = 64
    dense_share: float = 0.3
    mask_share: float = 0.35
    weight_rate: float = 0.025
    score_rate: float = 0.1
    operation_rate: float = 3e-4
    gradient_clip: float = 5.0
    sparse_objective: bool = True
    most_skips: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"DASS: sparsity = {self.sparsity} must be at least 0 and below 1.")
        if min(self.epochs, self.cells, self.channels, self.batch_size) < 1:
            raise UsageError("DASS: epochs, cells, channels and batch_size must be at least 1.")
        if min(self.dense_share, self.mask_share) < 0 or self.dense_share + self.mask_share >= 1:
            raise UsageError("DASS: dense_share and mask_share must leave epochs for the last phase.")


@dataclass(frozen=True)
class DASSResult:
    """The cells found, a fresh network of them at the same sparsity, and (phase, loss) of every epoch."""

    genotype: Genotype
    model: CellNet
    history: tuple[tuple[str, float], ...]


def search(data: ImageData, settings: DASSSettings | None = None) -> DASSResult:
    r"""Search the cell whose sparse network has the lowest loss on held-out training images.

    .. math:: \min_\alpha L_{val}(W^* M^*, \alpha) \quad\text{s.t.}\quad W^*, S^* = \arg\min L_{train}(W M(S), \alpha)

    first order, half of the training images each. The supernet's weights are thrown away: train the network found
    dense (`masks_off`), its scores (`CellNet.score_parameters`), then the weights under `masks_fixed`. Runs on the CPU.
    Raises `TrainingError` for a loss that is not finite. Costs about one and a half DARTS searches. Source: Mousavi et
    al., DASS, arXiv 2207.06968.
    """
    settings = settings or DASSSettings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        shared: Any = {"in_channels": data.preprocessing.channels, "num_classes": data.num_classes}
        net = CellNet(settings.channels, settings.cells, sparsity=settings.sparsity, **shared)
        history, found = _run(net, data, settings)
        model = CellNet(settings.channels, settings.cells, sparsity=settings.sparsity, genotype=found, **shared)
    return DASSResult(found, model, history)


def phase_of(epoch: int, settings: DASSSettings) -> str:
    """Return the phase of an epoch: "weights", "masks" or "masked weights"."""
    share = epoch / settings.epochs
    if share < settings.dense_share:
        return "weights"
    return "masks" if share < settings.dense_share + settings.mask_share else "masked weights"


def _run(net: CellNet, data: ImageData, settings: DASSSettings) -> tuple[tuple[tuple[str, float], ...], Genotype]:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(settings.seed))
    halves = order.split((len(order) + 1) // 2)
    weights = torch.optim.SGD(net.weight_parameters(), settings.weight_rate, momentum=0.9, weight_decay=3e-4)
    scores = torch.optim.SGD(net.score_parameters(), settings.score_rate)  # no decay: it would close what is small
    operations = torch.optim.Adam(net.architecture(), settings.operation_rate, betas=(0.5, 0.999), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weights, settings.epochs, 1e-3)
    draw, history = torch.Generator().manual_seed(settings.seed + 1), []
    found = net.genotype()
    net.train()
    with progress("DASS", settings.epochs, "epoch") as advance:
        for epoch in range(settings.epochs):
            phase = phase_of(epoch, settings)
            learner = scores if phase == "masks" else weights
            held = masks_off(net) if phase == "weights" else masks_fixed(net) if phase != "masks" else nullcontext()
            total, steps = 0.0, 0
            with held:
                for first, second in _pairs(data, halves, settings.batch_size, draw):
                    if phase != "weights" or not settings.sparse_objective:
                        dense = nullcontext() if settings.sparse_objective else masks_off(net)
                        with dense:
                            _step(net, data, second, operations, settings.gradient_clip)
                    total += _step(net, data, first, learner, settings.gradient_clip)
                    steps += 1
            schedule.step()
            history.append((phase, total / max(1, steps)))
            advance(1, detail=phase)
            now = net.genotype()
            if epoch and phase != "weights" and collapsed(now, settings.most_skips):
                note(f"DASS: more than {settings.most_skips} skips after epoch {epoch + 1}; the search ends here")
                break
            found = now
    return tuple(history), found


def collapsed(genotype: Genotype, most_skips: int | None) -> bool:
    """Tell whether the normal cell has more than `most_skips` skips."""
    return most_skips is not None and sum(name == "skip" for name, _ in genotype.normal) > most_skips


def _pairs(
    data: ImageData, halves: tuple[Tensor, ...], size: int, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    shuffled = [half[torch.randperm(len(half), generator=draw)] for half in halves]
    for at in range(0, len(shuffled[1]) - 1, size):
        first, second = (half[at : at + size] for half in shuffled)
        if len(second) > 1:
            yield first, second


def _step(net: nn.Module, data: ImageData, indices: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> float:
    images, labels = data.preprocessing(data.train.images(indices)), data.train.labels[indices]
    loss = functional.cross_entropy(net(images), labels)
    if not bool(torch.isfinite(loss)):
        raise TrainingError(f"DASS: the loss is {float(loss.detach())}; lower weight_rate or score_rate.")
    net.zero_grad(set_to_none=True)
    loss.backward()
    chosen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(chosen, clip)
    optimizer.step()
    return float(loss.detach())
