"""The search: weights on one half of the training images, sizes on the other, in turns."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from convette._progress import progress
from convette.data import ImageData
from convette.errors import TrainingError, UsageError
from convette.pruning.transformable_architecture_search.choices import budget_loss
from convette.pruning.transformable_architecture_search.shapes import Shape, ShapedResNet, shape_macs
from convette.pruning.transformable_architecture_search.supernet import SearchResNet


@dataclass(frozen=True)
class TASSettings:
    """How the search runs. Published: 600 epochs of batches of 256; the defaults suit small images and minutes.

    - `macs`: the target, as a share of the whole network's (0.5), met within 5 % below it as far as the search goes.
    - `blocks`, `widths`: of the network searched in. `epochs`, `batch_size`; rates and decays of the weights (SGD with
      momentum, cosine) and of the sizes (Adam). `budget_weight`: of the budget's loss.
    """

    macs: float = 0.5
    blocks: int = 3
    widths: tuple[int, int, int] = (16, 32, 64)
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    size_rate: float = 1e-3
    size_decay: float = 1e-3
    budget_weight: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise UsageError(f"TAS: macs = {self.macs} must be above 0 and at most 1.")
        if min(self.epochs, self.blocks, self.batch_size) < 1:
            raise UsageError("TAS: epochs, blocks and batch_size must be at least 1.")


@dataclass(frozen=True)
class TASResult:
    """The shape found, a fresh network of it (train it with `convette.training.Distillation`), and the way there.

    `macs` of the shape and of the whole network on these images; `history`: MACs in millions of the most probable shape
    and the loss on the second half after each epoch.
    """

    shape: Shape
    model: ShapedResNet
    macs: int
    whole_macs: int
    history: tuple[tuple[float, float], ...]


def search(data: ImageData, settings: TASSettings | None = None) -> TASResult:
    r"""Search widths and depths of a residual network on `data` for a share of its MACs.

    .. math:: L_w = CE(D_1), \qquad L_{A,D} = CE(D_2) + 2\, L_{flop}, \qquad \tau: 5 \to 0.1

    Steps alternate between the two halves of ``data.train``. Runs on the CPU. The supernet's weights are thrown away:
    widths that were seldom drawn are starved, so only a network trained anew says what the shape is worth. Raises
    `TrainingError` if a loss is not finite. Costs about two trainings of the whole network.
    """
    settings = settings or TASSettings()
    size = data.preprocessing.height
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = SearchResNet(
            settings.blocks,
            settings.widths,
            num_classes=data.num_classes,
            in_channels=data.preprocessing.channels,
            seed=settings.seed,
        )
        history = _run(net, data, settings, size)
        whole = shape_macs(net.whole(), size, data.num_classes)
        model = ShapedResNet(net.shape(), data.num_classes)
    return TASResult(net.shape(), model, shape_macs(net.shape(), size, data.num_classes), whole, history)


def _run(net: SearchResNet, data: ImageData, settings: TASSettings, size: int) -> tuple[tuple[float, float], ...]:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(settings.seed))
    halves = order.split((len(order) + 1) // 2)
    weights = torch.optim.SGD(
        net.weights(), settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    sizes = torch.optim.Adam(
        net.architecture(), settings.size_rate, betas=(0.5, 0.999), weight_decay=settings.size_decay
    )
    whole = shape_macs(net.whole(), size, data.num_classes) / 1e6
    steps = max(1, len(halves[0]) // settings.batch_size)
    draw, history = torch.Generator().manual_seed(settings.seed + 1), []
    net.train()
    with progress("TAS", settings.epochs * steps, "step") as advance:
        for epoch in range(settings.epochs):
            share = 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
            net.temperature = 0.1 + 4.9 * share
            for group in weights.param_groups:
                group["lr"] = settings.learning_rate * share
            shuffled = [half[torch.randperm(len(half), generator=draw)] for half in halves]
            total = 0.0
            for step in range(steps):
                first, second = (part.roll(-step * settings.batch_size)[: settings.batch_size] for part in shuffled)
                _step(net, data, first, weights, None)
                cost = budget_loss(net.expected_macs(size), net.macs(size), settings.macs * whole, whole)
                total += _step(net, data, second, sizes, settings.budget_weight * cost)
                advance(1, detail=f"{net.macs(size) / whole:.0%} of the MACs")
            history.append((net.macs(size), total / steps))
    return tuple(history)


def _step(
    net: SearchResNet,
    data: ImageData,
    indices: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    extra: torch.Tensor | None,
) -> float:
    images, labels = data.preprocessing(data.train.images(indices)), data.train.labels[indices]
    loss = functional.cross_entropy(net(images), labels)
    if not bool(torch.isfinite(loss)):
        raise TrainingError(f"TAS: the loss is {float(loss.detach())}; lower learning_rate.")
    net.zero_grad(set_to_none=True)
    (loss if extra is None else loss + extra).backward()
    optimizer.step()
    return float(loss.detach())
